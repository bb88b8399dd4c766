// How long each stage took for an answer, as a bar and as a table.

import { count, duration, make } from "./dom.js";

const waitOf = (image) => (image.queue_seconds ?? 0) + (image.encode_seconds ?? 0);

/**
 * Return [name, seconds] of each stage.
 *
 * Of several images, the slowest one counts. The language model waits for the images in its queue
 * or in its prefill: that time counts as vision only.
 */
export function stagesOf(timings) {
  const slowest = (timings.images ?? []).reduce((a, b) => (waitOf(b) > waitOf(a) ? b : a), {});
  const queued = timings.queue_seconds ?? 0;
  const waitedInPrefill = Math.max(0, waitOf(slowest) - queued);
  const stages = [
    ["Preprocess", timings.preprocess_seconds],
    ["Vision queue", slowest.queue_seconds],
    ["Encode", slowest.encode_seconds],
    ["LLM queue", Math.max(0, queued - waitOf(slowest))],
    ["Prefill", Math.max(0, (timings.prefill_seconds ?? 0) - waitedInPrefill)],
    ["Decode", timings.decode_seconds],
  ].map(([name, seconds]) => [name, seconds ?? 0]);
  const known = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  return [...stages, ["Rest", Math.max(0, (timings.total_seconds ?? 0) - known)]];
}

/** Return the elements that show what an answer took. */
export function showTimings(timings, usage) {
  const stages = stagesOf(timings);
  const elements = [
    make("h3", {}, "Time by stage"),
    make("p", { class: "muted small" }, summary(timings, usage)),
    bar(stages),
    make("table", { class: "legend" }, make("tbody", {}, ...stages.map(legendRow))),
  ];
  const images = timings.images ?? [];
  if (images.length) {
    elements.push(make("p", { class: "muted small" }, "Where the language model waits for an image, that counts as vision."));
  }
  if (images.length > 1) {
    elements.push(imageTable(images));
  }
  return elements;
}

function summary(timings, usage) {
  const parts = [];
  if (timings.total_seconds !== undefined) {
    parts.push(`${duration(timings.total_seconds)} in all`);
  }
  if (timings.time_to_first_token_seconds !== undefined) {
    parts.push(`first token after ${duration(timings.time_to_first_token_seconds)}`);
  }
  if (usage) {
    const details = usage.prompt_tokens_details ?? {};
    parts.push(`${count(usage.prompt_tokens, "prompt token")}, ${details.image_tokens ?? 0} of images`);
    if (details.cached_tokens) {
      parts.push(`${details.cached_tokens} of them cached`);
    }
    if (usage.completion_tokens) {
      parts.push(`${count(usage.completion_tokens, "token")} written`);
    }
  }
  return parts.join(" · ");
}

function bar(stages) {
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0);
  const parts = stages.map(([, seconds], index) => {
    const part = make("span", { "data-stage": index });
    part.style.width = `${(100 * seconds) / total}%`;
    part.hidden = !seconds; // it would leave a gap
    return part;
  });
  return make("div", { class: "bar", "aria-hidden": "true" }, ...parts);
}

function legendRow([name, seconds], index) {
  const swatch = make("span", { class: "swatch", "data-stage": index, "aria-hidden": "true" });
  return make("tr", {}, make("th", { scope: "row" }, swatch, name), make("td", {}, duration(seconds)));
}

function imageTable(images) {
  const head = ["Image", "Preprocess", "Vision queue", "Encode"].map((name) => make("th", { scope: "col" }, name));
  const rows = images.map((image, index) => make(
    "tr",
    {},
    make("th", { scope: "row" }, String(index + 1)),
    make("td", {}, duration(image.preprocess_seconds ?? 0)),
    make("td", {}, duration(image.queue_seconds ?? 0)),
    make("td", {}, image.cached ? "cached" : duration(image.encode_seconds ?? 0)),
  ));
  return make("table", { class: "images" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}
