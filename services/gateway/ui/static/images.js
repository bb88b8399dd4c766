// The images of the next question: chosen, dropped or pasted, shown, and removed.

import { find, make } from "./dom.js";

/** Let the user gather images. Returns a function that returns them as [{name, url}]. */
export function gatherImages() {
  const chosen = new Map();
  const list = find("images");
  const drop = find("drop");
  const input = find("files");

  function add(files) {
    for (const file of files) {
      if (file.type.startsWith("image/")) {
        show(file);
      }
    }
  }

  function show(file) {
    const preview = URL.createObjectURL(file);
    const name = file.name || "image";
    const remove = make("button", { type: "button", "aria-label": `Remove ${name}`, title: "Remove" }, "×");
    const entry = make("li", {}, make("img", { src: preview, alt: name }), remove);
    chosen.set(entry, { file, name });
    remove.addEventListener("click", () => {
      URL.revokeObjectURL(preview);
      chosen.delete(entry);
      entry.remove();
      input.focus();
    });
    list.append(entry);
  }

  input.addEventListener("change", () => {
    add(input.files);
    input.value = "";
  });
  document.addEventListener("paste", (event) => add(event.clipboardData.files));
  // A file that misses the field must not replace the page. Text may be dropped into the question.
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event)) {
      event.preventDefault();
      drop.classList.add("over");
    }
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) {
      drop.classList.remove("over");
    }
  });
  document.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (hasFiles(event)) {
      event.preventDefault();
      add(event.dataTransfer.files);
    }
  });

  return () => Promise.all(
    Array.from(chosen.values(), async ({ file, name }) => ({ name, url: await dataUri(file, name) })),
  );
}

function dataUri(file, name) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${name} cannot be read any more. Remove it.`)));
    reader.readAsDataURL(file);
  });
}
