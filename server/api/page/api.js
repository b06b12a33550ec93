// The server's HTTP API, as far as this page uses it.

const STATUS_TIMEOUT_MS = 5000;
const EVENT_END = "\n\n";
const DATA = "data: ";

// Beside the page, wherever a proxy has put it. Without a user and password that the page's own
// address may hold, which fetch refuses.
const BASE = `${location.origin}${location.pathname}`;

/** What the server answered in place of what was asked for. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Returns `GET /status`; throws if it does not come in time. */
export async function fetchStatus() {
  const response = await fetch(new URL("status", BASE), {
    credentials: "same-origin",
    cache: "no-store",
    signal: AbortSignal.timeout(STATUS_TIMEOUT_MS),
  });
  if (!response.ok) throw await errorOf(response);
  return response.json();
}

/**
 * Posts a request and yields the data of each event of the answer.
 *
 * @param {string} path of the API, without a slash in front
 * @param {object} body asks for a stream
 * @param {AbortSignal} signal gives the request up, which the server notices
 */
export async function* streamEvents(path, body, signal) {
  const response = await fetch(new URL(path, BASE), {
    method: "POST",
    credentials: "same-origin",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError("the server ended the answer before it was complete", 0);
    text += value;
    const events = text.split(EVENT_END);
    text = events.pop();
    for (const event of events) {
      const data = event.slice(DATA.length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      // After the first event an error has no status of its own.
      if (chunk.error) throw new ApiError(chunk.error.message, 0);
      yield chunk;
    }
  }
}

async function errorOf(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // A proxy's answer need not be JSON; the status says enough.
  }
  return new ApiError(message, response.status);
}
