// Making elements. Texts are only ever set as text, so nothing that a model writes becomes markup.

const SVG = "http://www.w3.org/2000/svg";

export const find = (id) => document.getElementById(id);

/** Return a new element with these attributes. Children are elements or texts. */
export function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Set the text of an element, if it is another one. Screen readers announce changes only. */
export function setText(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

/** Return a time as people read it. */
export function duration(seconds) {
  if (seconds < 1) {
    const milliseconds = 1000 * seconds;
    return `${milliseconds.toFixed(milliseconds > 0.05 && milliseconds < 10 ? 1 : 0)} ms`;
  }
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** Return a number with its noun, such as "2 images". */
export const count = (number, noun, plural = `${noun}s`) => `${number} ${number === 1 ? noun : plural}`;

export const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
