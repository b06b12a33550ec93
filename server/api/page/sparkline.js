// A small line of recent values.

import { makeSvg } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;
const MARGIN = 2;

/** Draws the latest `size` values that it was given. */
export class Sparkline {
  /**
   * @param {Element} parent
   * @param {number} size
   */
  constructor(parent, size) {
    this.values = [];
    this.size = size;
    this.area = makeSvg("path", { class: "spark-area" });
    this.line = makeSvg("path", { class: "spark-line" });
    const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
    parent.append(makeSvg("svg", { ...box, "aria-hidden": "true" }, this.area, this.line));
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.size) this.values.shift();
    this.draw();
  }

  clear() {
    this.values = [];
    this.draw();
  }

  draw() {
    const { values, size } = this;
    if (values.length < 2) {
      this.line.setAttribute("d", "");
      this.area.setAttribute("d", "");
      return;
    }
    const most = Math.max(...values, 1);
    const step = WIDTH / (size - 1);
    const left = WIDTH - (values.length - 1) * step;
    const points = values.map((value, index) => {
      const y = HEIGHT - MARGIN - (value / most) * (HEIGHT - 2 * MARGIN);
      return `${(left + index * step).toFixed(1)} ${y.toFixed(1)}`;
    });
    const line = `M${points.join("L")}`;
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", `${line}L${WIDTH} ${HEIGHT}L${left.toFixed(1)} ${HEIGHT}Z`);
  }
}
