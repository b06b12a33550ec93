// Which head belongs to which group: a row for each layer, a column for each KV head.

import { byId, make, makeSvg, setText } from "./dom.js";
import { count, keeps } from "./format.js";

const WIDTH = 354;
const HEIGHT = 240;
const MAX_HEIGHT = 400;
const MIN_CELL = 5;
const MAX_CELL = 30;
const NUM_TONES = 5;
const SPACE = 8;

/** Returns the colour class of a group: heads that keep everything have one of their own. */
export function toneOf(groups, index) {
  if (groups[index].window_size === null) return "tone-all";
  const others = groups.slice(0, index).filter((group) => group.window_size !== null);
  return `tone-${others.length % NUM_TONES}`;
}

/** Draws the map and its legend, and tells of a head under the pointer or the arrow keys. */
export class HeadMap {
  /**
   * @param {Element} parent
   * @param {Element} legend
   */
  constructor(parent, legend) {
    this.parent = parent;
    this.legend = legend;
    this.tip = byId("tip");
    this.drawn = "";
  }

  /**
   * @param {number[][]} heads index into `groups`, by layer and KV head
   * @param {Array<object>} groups of the status
   */
  show(heads, groups) {
    const drawn = JSON.stringify([heads, groups.map(({ name }) => name)]);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    this.heads = heads;
    this.groups = groups;
    this.place = null;
    this.draw();
    this.drawLegend();
  }

  draw() {
    const { heads, groups } = this;
    const columns = Math.max(...heads.map((layer) => layer.length));
    const cellWidth = Math.min(MAX_CELL, WIDTH / columns);
    const height = Math.min(Math.max(HEIGHT, MIN_CELL * heads.length), MAX_HEIGHT);
    const cellHeight = Math.min(MAX_CELL, height / heads.length, cellWidth);
    const gap = Math.min(3, cellWidth * 0.14, cellHeight * 0.14);
    const box = `0 0 ${columns * cellWidth} ${heads.length * cellHeight}`;
    const parts = groups.map((group) => `${group.num_heads} ${group.name}`).join(", ");
    this.cells = [];
    const svg = makeSvg("svg", {
      viewBox: box,
      role: "img",
      tabindex: 0,
      "aria-label": `${heads.length} layers of ${columns} KV heads: ${parts}. Arrow keys move.`,
    });
    svg.style.width = `${columns * cellWidth}px`;
    heads.forEach((layer, row) => {
      layer.forEach((group, column) => {
        const cell = makeSvg("rect", {
          x: column * cellWidth + gap / 2,
          y: row * cellHeight + gap / 2,
          width: cellWidth - gap,
          height: cellHeight - gap,
          rx: Math.min(4, cellHeight / 5),
          class: `cell ${toneOf(groups, group)}`,
          "data-layer": row,
          "data-head": column,
          "data-group": group,
        });
        this.cells.push(cell);
        svg.append(cell);
      });
    });
    svg.addEventListener("pointermove", ({ target }) => {
      if (target.dataset.layer === undefined) this.hide();
      else this.point(Number(target.dataset.layer), Number(target.dataset.head));
    });
    svg.addEventListener("pointerleave", () => this.hide());
    svg.addEventListener("focus", () => (this.place = null));
    svg.addEventListener("blur", () => this.hide());
    svg.addEventListener("keydown", (event) => this.move(event));
    this.hide();
    this.parent.replaceChildren(svg);
    setText(byId("head-facts"), `${heads.length} layers × ${columns} KV heads`);
  }

  drawLegend() {
    const items = this.groups.map((group, index) => {
      const swatch = make("span", { class: `swatch ${toneOf(this.groups, index)}` });
      const name = make("span", { class: "name" }, group.name);
      const what = make("span", { class: "what" }, `${count(group.num_heads)} heads, ${keeps(group)}`);
      const item = make("li", {}, swatch, name, what);
      item.addEventListener("pointerenter", () => this.highlight(index));
      item.addEventListener("pointerleave", () => this.highlight(null));
      return item;
    });
    this.legend.replaceChildren(...items);
  }

  highlight(group) {
    for (const cell of this.cells) {
      const faint = group !== null && Number(cell.dataset.group) !== group;
      cell.classList.toggle("faint", faint);
    }
  }

  move(event) {
    const steps = {
      ArrowUp: [-1, 0],
      ArrowDown: [1, 0],
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
    };
    if (event.key === "Escape") this.hide();
    if (!(event.key in steps)) return;
    event.preventDefault();
    const [down, right] = steps[event.key];
    const [layer, head] = this.place ?? [-Math.max(down, 0), -Math.max(right, 0)];
    const row = Math.min(Math.max(layer + down, 0), this.heads.length - 1);
    this.point(row, Math.min(Math.max(head + right, 0), this.heads[row].length - 1));
  }

  point(layer, head) {
    this.hide();
    this.place = [layer, head];
    const group = this.groups[this.heads[layer][head]];
    const cell = this.cells.find(
      ({ dataset }) => Number(dataset.layer) === layer && Number(dataset.head) === head,
    );
    cell.classList.add("pointed");
    this.tip.replaceChildren(
      make("strong", {}, `Layer ${layer}, KV head ${head}`),
      make("span", {}, `${group.name}: ${keeps(group)}`),
    );
    this.tip.hidden = false;
    const box = cell.getBoundingClientRect();
    const tip = this.tip.getBoundingClientRect();
    const right = box.right + SPACE;
    const fits = right + tip.width + SPACE <= document.documentElement.clientWidth;
    const left = fits ? right : Math.max(SPACE, box.left - SPACE - tip.width);
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${Math.max(SPACE, box.top + box.height / 2 - tip.height / 2)}px`;
  }

  hide() {
    this.tip.hidden = true;
    for (const cell of this.cells) cell.classList.remove("pointed");
  }
}
