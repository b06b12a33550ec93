// The live view: asks for the status every second while the page is seen.

import { fetchStatus } from "./api.js";
import { CacheBars } from "./bars.js";
import { byId, setText } from "./dom.js";
import { bytes, count, duration, percent, rate, uptime } from "./format.js";
import { HeadMap } from "./headmap.js";
import { Sparkline } from "./sparkline.js";

const EVERY_MS = 1000;
const SPARK_POINTS = 60;
const NOTICES = {
  starting: "The server is starting.",
  draining: "The server is shutting down: it finishes what it has and takes nothing new.",
  dead: "The engine has stopped. The server ends, or is about to start again.",
  unreachable: "The server cannot be reached. Trying again every second.",
  unauthorized: "The server does not know this API key any more. Reload the page to give another.",
};

/** Shows the server's state, and tells the page of it. */
export class Live {
  /** @param {(status: object) => void} onStatus called with each status that arrives */
  constructor(onStatus) {
    this.onStatus = onStatus;
    this.headmap = new HeadMap(byId("headmap"), byId("legend"));
    this.bars = new CacheBars(byId("bars"));
    this.sparks = {
      prompt: new Sparkline(byId("prompt-spark"), SPARK_POINTS),
      generation: new Sparkline(byId("generation-spark"), SPARK_POINTS),
    };
    this.previous = null;
  }

  /** Polls for ever. */
  async run() {
    for (;;) {
      if (document.hidden) {
        await visible();
        // Nobody knows how the tokens of the meantime were spread.
        this.previous = null;
      }
      const next = new Promise((resolve) => setTimeout(resolve, EVERY_MS));
      try {
        this.show(await fetchStatus());
      } catch (error) {
        this.lose(error.status === 401 ? "unauthorized" : "unreachable");
      }
      await next;
    }
  }

  show(status) {
    this.setState(status.state);
    const name = status.models[0] ?? "";
    setText(byId("model"), name);
    byId("model").title = status.models.join(", ");
    document.title = name ? `${name} · Headlong` : "Headlong";
    const context = `${count(status.max_model_len)} tokens`;
    setText(byId("facts"), [status.device, status.dtype, context, status.version].join(" · "));
    setText(byId("uptime"), `up ${uptime(status.uptime_s)}`);
    this.headmap.show(status.head_groups, status.groups);
    this.bars.show(status.groups);
    this.showFigures(status);
    this.showCache(status);
    this.drawSparks(status);
    this.onStatus(status);
  }

  showFigures({ running, waiting, latency, throughput, preemptions_total: preemptions }) {
    setFigures({
      running: count(running),
      waiting: count(waiting),
      ttft: duration(latency.ttft_p50_s),
      "ttft-p90": latency.ttft_p90_s === null ? "" : `p90 ${duration(latency.ttft_p90_s)}`,
      itl: duration(latency.itl_p50_s),
      "generation-rate": `${rate(throughput.generation_tokens_per_s)} tok/s`,
      "prompt-rate": `${rate(throughput.prompt_tokens_per_s)} tok/s`,
      preemptions: count(preemptions),
    });
  }

  showCache({ kv_cache: kv, prefix_cache: prefix, canary }) {
    const share = ` · ${percent(kv.saved_bytes / kv.full_bytes)}`;
    const misses = Object.entries(prefix.misses_total).filter(([, tokens]) => tokens > 0);
    setFigures({
      "kv-owned": bytes(kv.owned_bytes),
      "kv-full": bytes(kv.full_bytes),
      "kv-saved": kv.full_bytes > 0 ? bytes(kv.saved_bytes) + share : bytes(null),
      "hit-rate": percent(prefix.hit_rate),
      misses: misses
        .map(([reason, tokens]) => `${count(tokens)} ${reason.replaceAll("_", " ")}`)
        .join(" · "),
    });
    byId("misses-line").hidden = misses.length === 0;
    byId("canary-line").hidden = canary.requests === 0;
    const kl = canary.mean_kl === null ? "" : ` · KL ${canary.mean_kl.toPrecision(2)}`;
    setText(byId("canary"), `${percent(canary.top1_agreement)}${kl}`);
  }

  drawSparks({ throughput }) {
    const now = {
      at: performance.now() / 1000,
      prompt: throughput.prompt_tokens_total,
      generation: throughput.generation_tokens_total,
    };
    const { previous } = this;
    this.previous = now;
    // A new server has counted less.
    const restarted = previous !== null && now.generation < previous.generation;
    if (previous === null || restarted) return this.clearSparks();
    for (const [name, spark] of Object.entries(this.sparks)) {
      spark.push((now[name] - previous[name]) / (now.at - previous.at));
    }
  }

  clearSparks() {
    for (const spark of Object.values(this.sparks)) spark.clear();
  }

  /** Shows that nothing is known any more: an old figure would look like a present one. */
  lose(state) {
    this.setState(state);
    for (const figure of document.querySelectorAll("#live dd:not(.spark)")) {
      setText(figure, figure.classList.contains("more") ? "" : "–");
    }
    setText(byId("uptime"), "");
    this.previous = null;
    this.clearSparks();
    this.bars.clear();
  }

  setState(state) {
    const pill = byId("state");
    if (pill.dataset.state === state) return;
    pill.dataset.state = state;
    setText(pill, state);
    const notice = byId("notice");
    setText(notice, NOTICES[state] ?? "");
    notice.hidden = !(state in NOTICES);
    byId("live").classList.toggle("lost", ["unreachable", "unauthorized"].includes(state));
  }
}

function setFigures(figures) {
  for (const [id, text] of Object.entries(figures)) setText(byId(id), text);
}

function visible() {
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
  });
}
