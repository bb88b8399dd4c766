// One question and its answer, from the click on Send to the last figure.

import { ApiError, chat, classify, embed, newRequestId, requestState } from "./api.js";
import { figuresOf } from "./boxes.js";
import { count, find, make, setText, sleep } from "./dom.js";
import { showTimings } from "./timings.js";

const POLL_SECONDS = 0.4;
const SPOKEN_CHARS = 200;
const WAITS = {
  gateway: "Waits for a stage to come back",
  preprocess: "In preprocess",
  vision: "In vision",
  llm: "In the language model",
};
const CUT_OFF = {
  length: "Cut off: the most tokens are reached.",
  repetition: "Cut off: the answer repeated itself.",
};

/** What the page shows of an answer. `onStage` is called with the stage that works on it. */
export class Answer {
  constructor(question, onStage) {
    this.question = question;
    this.onStage = onStage;
    this.stopping = new AbortController();
    this.isDone = false;
    this.text = document.createTextNode("");
    this.numSpoken = 0;
    for (const id of ["text", "labels", "figures", "timings"]) {
      find(id).replaceChildren();
    }
    find("text").append(this.text);
    find("spoken").textContent = "";
    find("error").hidden = true;
  }

  stop() {
    this.stopping.abort();
  }

  /** Ask, and show what comes, until the end or an error. */
  async run(task) {
    const id = newRequestId();
    this.setProgress("Sending");
    find("progress").toggleAttribute("data-busy", true);
    this.followStages(id);
    try {
      await this[task](id);
    } catch (error) {
      this.fail(error);
    } finally {
      this.isDone = true;
      find("progress").removeAttribute("data-busy");
      this.onStage("");
      this.speak(true);
    }
  }

  async generate(id) {
    const { maxTokens, temperature } = this.question;
    const body = { messages: this.messages() };
    if (maxTokens !== null) {
      body.max_tokens = maxTokens;
    }
    if (temperature !== null) {
      body.temperature = temperature;
    }
    let reason = "";
    for await (const chunk of chat(body, id, this.stopping.signal)) {
      const [choice] = chunk.choices;
      if (choice) {
        this.add(choice.delta);
        reason = choice.finish_reason ?? reason;
      }
      if (chunk.timings) {
        find("timings").replaceChildren(...showTimings(chunk.timings, chunk.usage));
      }
    }
    this.setProgress(CUT_OFF[reason] ?? "Done.");
  }

  async classify(id) {
    const answer = await classify({ messages: this.messages() }, id, this.stopping.signal);
    const [result] = answer.data;
    this.text.data = result.label;
    const rows = result.top.map(({ label, prob }) => {
      const fill = make("span", { class: "fill" });
      fill.style.width = `${100 * prob}%`;
      const chart = make("td", { class: "chart", "aria-hidden": "true" }, fill);
      return make("tr", {}, make("th", { scope: "row" }, label), make("td", {}, `${(100 * prob).toFixed(1)} %`), chart);
    });
    find("labels").replaceChildren(
      make("table", {}, make("caption", {}, `The likeliest of ${count(result.num_classes, "label")}`), make("tbody", {}, ...rows)),
    );
    find("timings").replaceChildren(...showTimings(answer.timings, answer.usage));
    this.setProgress("Done.");
  }

  async embed(id) {
    const answer = await embed({ messages: this.messages() }, id, this.stopping.signal);
    const [{ embedding, timings }] = answer.data;
    const first = embedding.slice(0, 8).map((value) => value.toFixed(4));
    this.text.data = `A vector of ${embedding.length} values: ${first.join(", ")}, …`;
    find("timings").replaceChildren(...showTimings(timings, answer.usage));
    this.setProgress("Done.");
  }

  messages() {
    const images = this.question.images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const text = this.question.text ? [{ type: "text", text: this.question.text }] : [];
    return [{ role: "user", content: [...images, ...text] }];
  }

  add(delta) {
    if (delta.content) {
      this.text.appendData(delta.content);
      this.setProgress("Answering");
      this.speak(false);
    }
    if (delta.twinlens?.boxes) {
      figuresOf(delta.twinlens.boxes, this.question.images).then((figures) => find("figures").append(...figures));
    }
  }

  /** Show what the request waits for, until the answer has ended. */
  async followStages(id) {
    while (!this.isDone) {
      await sleep(POLL_SECONDS);
      const state = await requestState(id, this.stopping.signal).catch(() => null);
      if (state && !this.isDone) {
        this.onStage(state.stage);
        if (state.interruption) {
          this.setProgress(`Interrupted: ${state.interruption}. It goes on by itself.`);
        } else if (!state.num_tokens) {
          const left = state.num_items_left;
          const images = state.stage === "vision" && left ? `: ${count(left, "image")} left` : "";
          this.setProgress((WAITS[state.stage] ?? state.stage) + images);
        }
      }
    }
  }

  fail(error) {
    if (error.name === "AbortError") {
      this.setProgress("Stopped.");
      return;
    }
    if (!(error instanceof ApiError)) {
      console.error(error);
    }
    this.setProgress("Failed.");
    const status = error.status >= 400 ? ` (${error.status})` : "";
    const retry = error.retryAfter ? `. Try again in ${count(error.retryAfter, "second")}.` : "";
    find("error").textContent = `${error.message}${status}${retry}`;
    find("error").hidden = false;
  }

  setProgress(text) {
    setText(find("progress"), text);
  }

  /** Let a screen reader read what is new, in pieces of a few sentences. */
  speak(isEnd) {
    const news = this.text.data.slice(this.numSpoken);
    if (news && (isEnd || (news.length > SPOKEN_CHARS && /[.!?:\n]\s*$/.test(news)))) {
      this.numSpoken = this.text.data.length;
      find("spoken").textContent = news;
    }
  }
}
