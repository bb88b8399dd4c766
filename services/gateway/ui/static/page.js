// The page: it connects the form, the answer and the pipeline.

import { Answer } from "./answer.js";
import { find } from "./dom.js";
import { gatherImages } from "./images.js";
import { Pipeline } from "./pipeline.js";

const form = find("ask");
const question = find("question");
const imagesOf = gatherImages();
const pipeline = new Pipeline();
let answer = null;

const numberOf = (id) => (find(id).value === "" ? null : Number(find(id).value));

async function send() {
  const asked = {
    images: await imagesOf(),
    text: question.value.trim(),
    maxTokens: numberOf("max-tokens"),
    temperature: numberOf("temperature"),
  };
  if (asked.images.length || asked.text) {
    answer = new Answer(asked, (role) => pipeline.markStage(role));
    await answer.run(pipeline.tasks.includes("generate") ? "generate" : pipeline.tasks[0]);
  } else {
    find("progress").textContent = "Type a question or choose an image first.";
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const hadFocus = document.activeElement === find("send");
  find("send").hidden = true;
  find("stop").hidden = false;
  if (hadFocus) {
    find("stop").focus();
  }
  try {
    await send();
  } catch (error) {
    find("progress").textContent = "Failed.";
    find("error").textContent = error.message;
    find("error").hidden = false;
  } finally {
    const hasFocus = document.activeElement === find("stop");
    find("stop").hidden = true;
    find("send").hidden = false;
    if (hasFocus) {
      find("send").focus();
    }
  }
});

// A field that is not valid must be seen, or the browser cannot say what is wrong with it.
form.addEventListener("invalid", () => find("options").toggleAttribute("open", true), true);

find("stop").addEventListener("click", () => answer?.stop());

question.addEventListener("keydown", (event) => {
  const isEnter = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (isEnter) {
    event.preventDefault();
    if (!find("send").hidden) {
      form.requestSubmit();
    }
  }
});

pipeline.follow();
