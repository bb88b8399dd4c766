// The boxes of an answer, drawn over its images and listed next to them.

import { count, make, makeSvg } from "./dom.js";

/** Return a figure for each image that has boxes. `images` are those that were sent. */
export async function figuresOf(boxes, images) {
  const numbered = boxes.map((box, index) => ({ ...box, number: index + 1 }));
  const figures = images.map((image, index) => figureOf(image, numbered.filter((box) => box.image === index)));
  return (await Promise.all(figures)).filter(Boolean);
}

async function figureOf(image, boxes) {
  if (!boxes.length) {
    return null;
  }
  const picture = make("img", { src: image.url, alt: `${image.name}, with ${count(boxes.length, "box", "boxes")}` });
  await picture.decode();
  const drawing = makeSvg(
    "svg",
    { viewBox: `0 0 ${picture.naturalWidth} ${picture.naturalHeight}`, "aria-hidden": "true" },
    ...boxes.map((box) => drawingOf(box, Math.max(picture.naturalWidth, picture.naturalHeight) / 22)),
  );
  const entries = boxes.map((box) => make("li", { value: box.number }, describe(box)));
  return make(
    "figure",
    {},
    make("div", { class: "frame" }, picture, drawing),
    make("figcaption", {}, make("ol", {}, ...entries)),
  );
}

function cornersOf({ box, quad }) {
  if (quad) {
    return quad;
  }
  const [left, top, right, bottom] = box;
  return [[left, top], [right, top], [right, bottom], [left, bottom]];
}

function drawingOf(box, size) {
  const corners = cornersOf(box);
  const [x, y] = corners[0];
  const label = makeSvg("text", { x, y: Math.max(y - size / 4, size), "font-size": size });
  label.append(box.ref ? `${box.number} ${box.ref}` : String(box.number));
  return makeSvg("g", {}, makeSvg("polygon", { points: corners.join(" ") }), label);
}

function describe(box) {
  const corners = cornersOf(box);
  const shown = box.quad ? corners : [corners[0], corners[2]];
  return `${box.ref || "box"}: ${shown.map(([x, y]) => `(${x}, ${y})`).join(" to ")}`;
}
