// Use of the cache, a bar for each head group.

import { make, setText } from "./dom.js";
import { bytes, count } from "./format.js";
import { toneOf } from "./headmap.js";

/** Shows how many blocks of each group are owned, cached and free. */
export class CacheBars {
  /** @param {Element} parent */
  constructor(parent) {
    this.parent = parent;
    this.rows = [];
  }

  /** @param {Array<object>} groups of the status */
  show(groups) {
    if (this.rows.length !== groups.length) this.build(groups);
    groups.forEach((group, index) => this.rows[index](group));
  }

  /** Forgets what was shown. */
  clear() {
    this.rows = [];
    this.parent.replaceChildren();
  }

  build(groups) {
    this.rows = [];
    const elements = groups.map((group) => {
      const owned = make("span", { class: "owned" });
      const cached = make("span", { class: "cached" });
      const track = make("div", { class: "track", role: "img" }, owned, cached);
      const amount = make("span", { class: "amount" });
      const name = make("span", { class: "name" }, group.name);
      this.rows.push((now) => {
        const share = (blocks) => `${(100 * blocks) / Math.max(now.num_blocks, 1)}%`;
        owned.style.width = share(now.owned_blocks);
        cached.style.width = share(now.cached_blocks);
        const words = [
          `${count(now.owned_blocks)} owned`,
          `${count(now.cached_blocks)} cached`,
          `${count(now.free_blocks)} free`,
        ].join(" · ");
        setText(amount, words);
        const size = bytes(now.num_blocks * now.block_bytes);
        track.setAttribute("aria-label", `${now.name}: ${words}, of ${size}`);
        track.title = `${count(now.num_blocks)} blocks, ${size}`;
      });
      const head = make("div", { class: "bar-head" }, name, amount);
      return make("div", { class: `bar ${toneOf(groups, groups.indexOf(group))}` }, head, track);
    });
    this.parent.replaceChildren(...elements);
  }
}
