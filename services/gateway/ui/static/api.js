// Everything that the page asks the gateway for. Whatever must go with each request goes here.

const ROOT = new URL("../", import.meta.url);
const LOST = "The connection to the gateway is lost. See whether it runs, and try again.";
const BROKEN = "The connection broke before the answer was complete. Try again.";

/** A failed request. `status` is 0 if there was no answer. */
export class ApiError extends Error {
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Return an id for a request that nobody else can guess. */
export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Yield the chunks of a streamed chat completion. */
export async function* chat(body, requestId, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await post("v1/chat/completions", whole, requestId, signal);
  for await (const data of events(response)) {
    if (data === "[DONE]") {
      return;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) {
      throw new ApiError(response.status, chunk.error.message);
    }
    yield chunk;
  }
  throw new ApiError(0, BROKEN);
}

export async function classify(body, requestId, signal) {
  return (await post("v1/classify", { ...body, top_k: 5 }, requestId, signal)).json();
}

export async function embed(body, requestId, signal) {
  return (await post("v1/embeddings", { ...body, timings: true }, requestId, signal)).json();
}

/** Yield the state of the pipeline, about once a second. */
export async function* pipelineStates(signal) {
  for await (const data of events(await ask("ui/events", { signal }))) {
    yield JSON.parse(data);
  }
}

/** Return where a request in flight is, or null. */
export async function requestState(requestId, signal) {
  return (await ask(`ui/requests/${requestId}`, { signal })).json();
}

function post(path, body, requestId, signal) {
  const headers = { "content-type": "application/json", "x-request-id": requestId };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function ask(path, options) {
  const response = await orLost(fetch(new URL(path, ROOT), { cache: "no-store", ...options }), LOST);
  if (response.ok) {
    return response;
  }
  const answer = await response.json().catch(() => null);
  const retryAfter = Number(response.headers.get("retry-after")) || null;
  throw new ApiError(response.status, answer?.error?.message ?? response.statusText, retryAfter);
}

/** Yield the data of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  try {
    for (;;) {
      const { value, done } = await orLost(reader.read(), BROKEN);
      if (done) {
        return;
      }
      const parts = (unread + value).split("\n\n");
      unread = parts.pop();
      yield* parts.filter((part) => part.startsWith("data: ")).map((part) => part.slice(6));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Wait for a network operation. Without a network it fails with a message for people. */
function orLost(operation, message) {
  return operation.catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError(0, message);
  });
}
