// The pipeline, drawn live: a column for each stage, a card for each of its members.

import { pipelineStates } from "./api.js";
import { count, duration, find, make, setText, sleep } from "./dom.js";

const RETRY_SECONDS = 1;
const MAX_SLOTS = 8;
const NAMES = {
  gateway: "Gateway",
  preprocess: "Preprocess",
  vision: "Vision",
  llm: "Language",
  detokenizer: "Detokenizer",
};

/** Draws states of the pipeline. `tasks` is what the model does. */
export class Pipeline {
  constructor() {
    this.tasks = ["generate"];
    this.columns = new Map();
    this.cards = new Map();
    this.stage = "";
    this.changes = [];
    this.hasDrawn = false;
    this.feed = new AbortController();
    document.addEventListener("visibilitychange", () => document.hidden && this.feed.abort());
  }

  /**
   * Show the pipeline for ever, while the page can be seen.
   *
   * A browser has few connections to one server, and a feed keeps one.
   */
  async follow() {
    for (;;) {
      await untilShown();
      try {
        this.feed = new AbortController();
        for await (const state of pipelineStates(this.feed.signal)) {
          this.draw(state);
        }
      } catch (error) {
        if (error.name === "AbortError") {
          continue;
        }
        this.setHealth("dead", "no connection");
        find("pipeline").classList.add("old");
        find("pipeline-state").textContent = error.message;
      }
      await sleep(RETRY_SECONDS);
    }
  }

  /** Mark the stage that works on the page's own request; an empty one for none. */
  markStage(role) {
    this.stage = role;
    for (const [name, column] of this.columns) {
      column.element.classList.toggle("current", name === role);
      column.mark.hidden = name !== role;
    }
  }

  draw(state) {
    this.tasks = state.tasks;
    find("pipeline").classList.remove("old");
    setText(find("model"), state.model);
    this.setHealth(state.unready ? "starting" : "ready", state.unready || "ready");
    setText(find("pipeline-state"), this.summary(state));
    const roles = new Set(state.stages.map((stage) => stage.role));
    for (const [role, column] of this.columns) {
      if (!roles.has(role)) {
        column.element.remove();
        this.columns.delete(role);
      }
    }
    this.changes = [];
    state.stages.forEach((stage) => this.drawStage(stage));
    this.markStage(this.stage);
    if (this.changes.length && this.hasDrawn) {
      find("changes").textContent = this.changes.join(", ");
    }
    this.hasDrawn = true;
  }

  summary({ gateway, is_current }) {
    const parts = [
      `${count(gateway.in_flight, "request")} being answered`,
      `${gateway.waiting} waiting for the first token`,
    ];
    if (gateway.first_token_seconds !== null) {
      parts.push(`first token lately after ${duration(gateway.first_token_seconds)}`);
    }
    if (!is_current) {
      parts.push("the controller cannot be reached, so the loads are old");
    }
    return parts.join(" · ");
  }

  setHealth(state, text) {
    const health = find("health");
    health.dataset.state = state;
    setText(health, text);
  }

  drawStage(stage) {
    const column = this.columns.get(stage.role) ?? this.addColumn(stage.role);
    const hidden = stage.hidden ? `, ${stage.hidden} not shown` : "";
    setText(column.ready, `${stage.ready} ready${hidden}`);
    setText(column.load, loadOf(stage));
    const ids = new Set(stage.members.map((member) => member.id));
    for (const [id, card] of this.cards) {
      if (card.role === stage.role && !ids.has(id)) {
        this.removeCard(id, card);
      }
    }
    stage.members.forEach((member) => this.drawMember(stage.role, column, member));
  }

  addColumn(role) {
    const ready = make("p", { class: "muted small" });
    const load = make("p", { class: "muted small" });
    const mark = make("p", { class: "mark small" }, "your request is here");
    const members = make("ul");
    const title = make("h3", {}, NAMES[role] ?? role);
    const element = make("li", { "data-role": role }, title, ready, load, mark, members);
    find("stages").append(element);
    const column = { element, ready, load, mark, members };
    this.columns.set(role, column);
    return column;
  }

  drawMember(role, column, member) {
    const card = this.cards.get(member.id) ?? this.addCard(role, column, member.id);
    const state = member.hung && member.state !== "dead" ? "hung" : member.state;
    if (card.element.dataset.state !== state) {
      this.changes.push(`${member.id}: ${state}`);
      card.element.dataset.state = state;
    }
    setText(card.state, state);
    drawSlots(card.slots, member);
    setText(card.load, [loadOf(member), placesOf(member)].filter(Boolean).join(" · "));
    setText(card.detail, member.detail);
  }

  addCard(role, column, id) {
    const state = make("p", { class: "badge" });
    const slots = make("p", { class: "slots", "aria-hidden": "true" });
    const load = make("p", { class: "muted small" });
    const detail = make("p", { class: "muted small" });
    const name = make("p", { class: "name" }, id);
    const element = make("li", { class: "member", "data-id": id }, name, state, slots, load, detail);
    column.members.append(element);
    const card = { role, element, state, slots, load, detail };
    this.cards.set(id, card);
    return card;
  }

  removeCard(id, card) {
    this.cards.delete(id);
    card.element.classList.add("leaving");
    if (card.element.getAnimations().length) {
      card.element.addEventListener("animationend", () => card.element.remove());
    } else {
      card.element.remove();
    }
  }
}

async function untilShown() {
  while (document.hidden) {
    await new Promise((resolve) => {
      document.addEventListener("visibilitychange", resolve, { once: true });
    });
  }
}

/** Draw a dot for each unit of work in progress, each queued one, and each free place. */
function drawSlots(element, member) {
  const kinds = [
    ...Array(member.in_flight).fill("busy"),
    ...Array(member.queued).fill("queued"),
    ...Array(member.credits).fill("free"),
  ].slice(0, MAX_SLOTS);
  while (element.children.length > kinds.length) {
    element.lastChild.remove();
  }
  kinds.forEach((kind, index) => {
    const slot = element.children[index] ?? element.appendChild(make("span"));
    slot.className = kind;
  });
}

/** Return what a member or a stage holds; empty if it holds nothing. */
function loadOf({ in_flight, queued }) {
  return [in_flight && `${in_flight} in work`, queued && `${queued} queued`].filter(Boolean).join(" · ");
}

function placesOf(member) {
  const parts = [];
  if (member.credits) {
    parts.push(`${count(member.credits, "place")} free`);
  }
  if (member.expected_delay > 0) {
    parts.push(`the next begins in ${duration(member.expected_delay)}`);
  }
  return parts.join(" · ");
}
