/* The strip above the text: the chosen quantity over the response on a canvas; a press goes to the token there. */

const STRIP_HEIGHT_PX = 64;

class CreditStrip {
  constructor(goTo) {
    this.canvas = element("canvas", { class: "strip", tabindex: "0", role: "slider", "aria-valuemin": 0 });
    this.canvas.setAttribute("aria-label", "Position in the response. Arrow keys move by a hundredth of it.");
    this.window = element("div", { class: "window", "aria-hidden": "true" });
    this.node = element("div", { class: "strip-box" }, this.canvas, this.window);
    this.goTo = goTo;
    this.numTokens = 0;
    let isHeld = false;
    this.canvas.addEventListener("pointerdown", (event) => {
      isHeld = true;
      this.canvas.setPointerCapture(event.pointerId);
      this.goToPointer(event);
    });
    this.canvas.addEventListener("pointermove", (event) => isHeld && this.goToPointer(event));
    this.canvas.addEventListener("pointerup", () => (isHeld = false));
    this.canvas.addEventListener("pointercancel", () => (isHeld = false));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  goToPointer(event) {
    const place = this.canvas.getBoundingClientRect();
    const part = (event.clientX - place.left) / place.width;
    this.goTo(within(Math.floor(part * this.numTokens), 0, this.numTokens - 1));
  }

  onKey(event) {
    const pace = Math.max(1, Math.round(this.numTokens / 100));
    const moves = { ArrowLeft: this.at - pace, ArrowRight: this.at + pace, Home: 0, End: this.numTokens - 1 };
    if (!(event.key in moves) || !this.numTokens) return;
    event.preventDefault();
    this.goTo(within(moves[event.key], 0, this.numTokens - 1));
  }

  show(view, quantity) {
    this.numTokens = view.numTokens;
    this.values = view.values(quantity);
    this.leftOut = view.leftOut;
    this.centre = QUANTITIES[quantity].centre;
    this.canvas.setAttribute("aria-valuemax", Math.max(0, this.numTokens - 1));
    this.draw();
  }

  /** The range of tokens in view, and the chosen token. */
  mark([first, last], at) {
    this.at = Math.max(0, at);
    this.window.style.left = `${(100 * first) / (this.numTokens || 1)}%`;
    this.window.style.width = `${(100 * (last - first)) / (this.numTokens || 1)}%`;
    this.canvas.setAttribute("aria-valuenow", this.at);
    this.canvas.setAttribute("aria-valuetext", `token ${this.at + 1} of ${this.numTokens}`);
  }

  draw() {
    if (!this.values) return;
    const width = this.node.clientWidth;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(STRIP_HEIGHT_PX * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    const { low, high } = this.limits();
    const y = (value) => 4 + ((high - value) / (high - low)) * (STRIP_HEIGHT_PX - 12);
    context.fillStyle = styleValue("--rule");
    context.fillRect(0, y(this.centre), width, 1);
    const columns = Math.min(width, this.numTokens);
    for (let column = 0; column < columns; column += 1) this.drawColumn(context, column, columns, width, y);
  }

  limits() {
    let [low, high] = [this.centre, this.centre];
    for (const value of this.values) {
      if (!isNumber(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return low === high ? { low: low - 1, high: high + 1 } : { low, high };
  }

  /** One pixel column, from the smallest to the largest of its tokens' values; tokens left out beneath. */
  drawColumn(context, column, columns, width, y) {
    const first = Math.floor((column * this.numTokens) / columns);
    const last = Math.max(first + 1, Math.floor(((column + 1) * this.numTokens) / columns));
    let [low, high] = [this.centre, this.centre];
    let isLeftOut = false;
    for (let index = first; index < last; index += 1) {
      const value = this.values[index];
      if (value < low) low = value;
      if (value > high) high = value;
      if (this.leftOut[index]) isLeftOut = true;
    }
    const left = (column * width) / columns;
    const right = Math.max(1, width / columns - (width / columns > 3 ? 1 : 0));
    const paintRange = (from, to, colour) => {
      context.fillStyle = styleColours[colour];
      context.fillRect(left, y(to), right, Math.max(to > from ? 1 : 0, y(from) - y(to)));
    };
    paintRange(this.centre, high, "--above-line");
    paintRange(low, this.centre, "--below-line");
    if (isLeftOut) {
      context.fillStyle = styleColours["--muted"];
      context.fillRect(left, STRIP_HEIGHT_PX - 4, right, 3);
    }
  }
}

/* Colours of the strip, read once for each scheme: reading a style for each column would cost more than drawing. */
const styleColours = {};

function readStripColours() {
  for (const variable of ["--above-line", "--below-line", "--muted"]) styleColours[variable] = styleValue(variable);
}

/** The scale of the colours, with its numbers. */
function creditLegend(view, name) {
  const { title, centre, isPositive } = QUANTITIES[name];
  const reach = view.reaches[name];
  const parts = isPositive ? [0, 0.5, 1] : [-1, -0.5, 0, 0.5, 1];
  return element(
    "div",
    { class: `legend-scale${isPositive ? " positive" : ""}` },
    element("span", {}, title),
    element(
      "div",
      { class: "scale" },
      element("div", { class: "gradient", "aria-hidden": "true" }),
      element(
        "div",
        { class: "ticks" },
        parts.map((part) => element("span", {}, formatNumber(centre + part * reach))),
      ),
    ),
    element("span", { class: "key" }, element("span", { class: "token left-out" }, "struck"), " not in the loss"),
  );
}
