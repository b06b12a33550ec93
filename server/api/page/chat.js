// The playground: a conversation, streamed.

import { streamEvents } from "./api.js";
import { byId, make, setText } from "./dom.js";
import { longExample } from "./example.js";
import { bytes, count, duration, rate } from "./format.js";

const NEAR_END_PX = 60;
const LONG_TEXT_CHARS = 700;
const WIDER = 4;

/** Holds one conversation and the settings of its next request. */
export class Chat {
  constructor() {
    this.log = byId("log");
    this.prompt = byId("prompt");
    this.button = byId("send");
    this.policy = byId("policy");
    this.window = byId("window");
    this.messages = [];
    this.status = null;
    this.running = null;
    this.prompt.addEventListener("keydown", (event) => {
      // While an input method is composing, Enter chooses its suggestion.
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (this.running === null) this.send();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    this.button.addEventListener("click", () => (this.running === null ? this.send() : this.stop()));
    byId("clear").addEventListener("click", () => this.clear());
    byId("example").addEventListener("click", () => this.fillExample());
    this.policy.addEventListener("change", () => this.showWindow());
    this.empty = byId("empty");
  }

  /** Takes the latest status: which model there is, and what its heads keep. */
  update(status) {
    const first = this.status === null;
    this.status = status;
    if (!first) return;
    const streaming = status.groups.find(({ name }) => name === "streaming");
    this.policy.disabled = streaming === undefined;
    if (streaming !== undefined) {
      this.window.min = streaming.window_size;
      this.window.value = Math.min(WIDER * streaming.window_size, status.max_model_len);
    }
    byId("max-tokens").max = status.max_model_len;
    if (!status.has_chat_template) {
      this.prompt.placeholder = "Text to continue: this model has no chat template";
    }
  }

  clear() {
    this.stop();
    this.setRunning(null);
    this.messages = [];
    this.log.replaceChildren(this.empty);
    this.prompt.focus();
  }

  stop() {
    this.running?.abort();
  }

  fillExample() {
    this.prompt.value = longExample(this.status?.max_model_len ?? 1024);
    this.prompt.focus();
    this.prompt.setSelectionRange(this.prompt.value.length, this.prompt.value.length);
    this.prompt.scrollTop = this.prompt.scrollHeight;
  }

  showWindow() {
    byId("window-label").hidden = this.policy.value !== "wider";
  }

  async send() {
    const text = this.prompt.value.trim();
    if (text === "") return;
    const wrong = [byId("temperature"), byId("max-tokens"), this.window].find(
      (field) => !field.closest("label").hidden && !field.reportValidity(),
    );
    if (wrong !== undefined) return;
    this.prompt.value = "";
    this.empty.remove();
    this.log.append(userMessage(text));
    const answer = new Answer(this.log);
    const running = new AbortController();
    const messages = this.messages;
    this.setRunning(running);
    try {
      if (this.status === null) throw new Error("the server has not answered yet");
      const asked = [...messages, { role: "user", content: text }];
      await this.stream(asked, answer, running.signal);
      answer.end();
      messages.push(...asked.slice(-1), { role: "assistant", content: answer.text });
    } catch (error) {
      if (running.signal.aborted) {
        answer.end("stopped");
        messages.push({ role: "user", content: text }, { role: "assistant", content: answer.text });
      } else {
        answer.fail(error.message);
        if (this.prompt.value === "") this.prompt.value = text;
      }
    } finally {
      // A new chat may have begun meanwhile.
      if (this.running === running) this.setRunning(null);
    }
  }

  async stream(messages, answer, signal) {
    const chat = this.status.has_chat_template;
    const path = chat ? "v1/chat/completions" : "v1/completions";
    const content = chat ? { messages } : { prompt: messages.at(-1).content };
    for await (const chunk of streamEvents(path, { ...content, ...this.settings() }, signal)) {
      const [choice] = chunk.choices;
      answer.add((chat ? choice?.delta.content : choice?.text) ?? "");
      answer.note(chunk.usage, choice?.finish_reason);
    }
  }

  settings() {
    const settings = {
      model: this.status.models[0],
      stream: true,
      // The usage in every chunk: a request that is stopped has no last one.
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    const temperature = byId("temperature").valueAsNumber;
    const maxTokens = byId("max-tokens").valueAsNumber;
    if (!Number.isNaN(temperature)) settings.temperature = temperature;
    if (!Number.isNaN(maxTokens)) settings.max_tokens = maxTokens;
    if (this.policy.value === "full") settings.kv_policy = "full";
    if (this.policy.value === "wider") {
      settings.kv_policy = { window_size: this.window.valueAsNumber };
    }
    return settings;
  }

  setRunning(running) {
    this.running = running;
    const busy = running !== null;
    setText(this.button, busy ? "Stop" : "Send");
    this.button.classList.toggle("stop", busy);
    this.log.setAttribute("aria-busy", String(busy));
  }
}

/** One answer and the figures beneath it. */
class Answer {
  constructor(log) {
    this.log = log;
    this.content = document.createTextNode("");
    this.body = make("p", { class: "text waiting" }, this.content);
    this.figures = make("p", { class: "figures-line" });
    this.asked = performance.now();
    this.first = null;
    this.last = null;
    this.usage = null;
    this.reason = null;
    const label = make("span", { class: "hidden" }, "Model");
    this.log.append(make("article", { class: "message model" }, label, this.body, this.figures));
    this.log.scrollTop = this.log.scrollHeight;
  }

  get text() {
    return this.content.data;
  }

  add(text) {
    if (text === "") return;
    this.body.classList.remove("waiting");
    this.keepEndInView(() => this.content.appendData(text));
  }

  note(usage, reason) {
    // Tokens are counted, not pieces of text: not every token has text.
    if ((usage?.completion_tokens ?? 0) > (this.usage?.completion_tokens ?? 0)) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    this.usage = usage ?? this.usage;
    this.reason = reason ?? this.reason;
    if (this.usage !== null) this.keepEndInView(() => this.show());
  }

  end(reason = this.reason) {
    this.body.classList.remove("waiting");
    if (this.text === "") this.body.classList.add("nothing");
    this.reason = reason;
    this.keepEndInView(() => this.show());
  }

  fail(message) {
    this.end(null);
    this.body.classList.remove("nothing");
    const error = make("p", { class: "error", role: "alert" }, message);
    this.keepEndInView(() => this.figures.before(error));
  }

  /** Scrolls along with the text, unless the reader has scrolled away from its end. */
  keepEndInView(change) {
    const { log } = this;
    const near = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
    change();
    if (near) log.scrollTop = log.scrollHeight;
  }

  show() {
    const { usage } = this;
    const parts = [];
    if (usage !== null) {
      const cached = usage.prompt_tokens_details.cached_tokens;
      parts.push(["Prompt", `${count(usage.prompt_tokens)} tokens, ${count(cached)} cached`]);
      parts.push(["Answer", `${count(usage.completion_tokens)} tokens`]);
    }
    if (this.first !== null) parts.push(["TTFT", duration((this.first - this.asked) / 1000)]);
    const seconds = (this.last - this.first) / 1000;
    if (usage !== null && seconds > 0 && usage.completion_tokens > 1) {
      parts.push(["Speed", `${rate((usage.completion_tokens - 1) / seconds)} tok/s`]);
    }
    if (usage?.kv_cache) {
      const { peak_bytes: peak, full_bytes: full } = usage.kv_cache;
      parts.push(["KV peak", `${bytes(peak)} of ${bytes(full)} full`]);
    }
    if (this.reason === "length") parts.push(["Ended", "max tokens reached"]);
    if (this.reason === "stopped") parts.push(["Ended", "stopped by you"]);
    const items = parts.map(([name, value]) =>
      make("span", {}, make("span", { class: "name" }, name), ` ${value}`),
    );
    this.figures.replaceChildren(...items);
  }
}

function userMessage(text) {
  const label = make("span", { class: "hidden" }, "You");
  const body = make("p", { class: "text" }, text);
  const message = make("article", { class: "message user" }, label, body);
  if (text.length > LONG_TEXT_CHARS) {
    body.classList.add("folded");
    const button = make("button", { type: "button", class: "quiet", "aria-expanded": "false" });
    setText(button, `Show all ${count(text.length)} characters`);
    button.addEventListener("click", () => {
      const folded = body.classList.toggle("folded");
      button.setAttribute("aria-expanded", String(!folded));
      setText(button, folded ? `Show all ${count(text.length)} characters` : "Show less");
    });
    message.append(button);
  }
  return message;
}
