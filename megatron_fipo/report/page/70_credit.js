/* The credit view: the chosen response, coloured, with the slider of the half-life. */

const LOG2_LONGEST = 9; // the slider goes from 1 to 512 tokens

class Credit {
  constructor(data) {
    this.quantity = "influence_weight";
    this.view = null;
    this.text = new TokenText({
      chosen: (index) => this.showToken(index),
      pointed: (index) => fillTokenRow(this.row, this.view, index ?? this.text.current),
      scrolled: () => this.markStrip(),
    });
    this.strip = new CreditStrip((index) => this.text.choose(index, true));
    this.row = element("div", { class: "token-row", role: "status", "aria-label": "The token" });
    this.head = element("div", { class: "response-head" });
    this.legend = element("div", {});
    this.notice = element("p", { class: "notice" });
    this.summary = element("p", { class: "summary" });
    this.slider = this.makeSlider();
    this.stretch = element("input", { type: "checkbox", on: { change: () => this.stretchColours() } });
    const opened = (run, group, response) => this.open(run, group, response);
    this.choice = new CreditChoice(data, opened);
    this.node = this.assemble();
  }

  assemble() {
    const spaces = element("input", { type: "checkbox" });
    spaces.addEventListener("change", () => this.text.box.classList.toggle("show-spaces", spaces.checked));
    const colour = selection(
      "Colour by",
      Object.entries(QUANTITIES).map(([name, { title }]) => [name, title]),
      this.quantity,
      (name) => {
        this.quantity = name;
        this.repaint();
        this.legend.replaceChildren(creditLegend(this.view, name));
      },
    );
    const reading = element(
      "div",
      { class: "reading-desk" },
      this.head,
      this.notice,
      element(
        "div",
        { class: "credit-controls" },
        colour,
        this.slider.node,
        element("label", { class: "check" }, spaces, "white space"),
        element("label", { class: "check" }, this.stretch, "stretch colours"),
      ),
      element("div", { class: "legend-line" }, this.legend, this.summary),
      this.strip.node,
      element("div", { class: "text-and-row" }, this.text.box, this.row),
    );
    return element(
      "div",
      { class: "credit" },
      this.choice.controls,
      element("div", { class: "credit-columns" }, this.choice.list, reading),
    );
  }

  makeSlider() {
    const range = element("input", {
      type: "range",
      min: 0,
      max: LOG2_LONGEST,
      step: 0.01,
      "aria-label": "Half-life in tokens, from 1 to 512",
    });
    const exact = element("input", {
      type: "number",
      min: 1,
      max: 2 ** LOG2_LONGEST,
      step: "any",
      "aria-label": "Half-life in tokens",
    });
    const own = element("i", { class: "own", "aria-hidden": "true" });
    const reset = element("button", { type: "button" }, "Reset");
    range.addEventListener("input", () => this.setHalfLife(Number((2 ** range.valueAsNumber).toPrecision(3))));
    exact.addEventListener(
      "input",
      () => exact.validity.valid && exact.value !== "" && this.setHalfLife(exact.valueAsNumber),
    );
    reset.addEventListener("click", () => this.setHalfLife(ownHalfLife(this.view.objective)));
    const node = element(
      "div",
      { class: "half-life", role: "group", "aria-label": "Half-life" },
      element("span", {}, "Half-life"),
      element("span", { class: "track" }, range, own),
      element("span", { class: "exact" }, exact, " tokens"),
      reset,
    );
    return { node, range, exact, own, reset };
  }

  open(run, group, response) {
    const tokens = response && tokensOf(response);
    this.view = tokens ? new CreditView(run, group, response, tokens, this.stretch.checked) : null;
    this.head.replaceChildren(...(response ? responseHead(group, response) : []));
    this.notice.textContent =
      response && !tokens
        ? "The page holds no tokens of this response: it was written with a smaller limit of tokens."
        : "";
    for (const node of [this.slider.node, this.strip.node, this.text.box, this.row, this.legend])
      node.toggleAttribute("hidden", !this.view);
    this.summary.textContent = "";
    if (!this.view) return;
    const { range, exact, reset, own } = this.slider;
    const place = within(Math.log2(this.view.halfLife) / LOG2_LONGEST, 0, 1);
    own.style.left = `calc(8px + (100% - 16px) * ${place})`;
    own.title = `The run's: ${formatNumber(this.view.halfLife)}`;
    [range.valueAsNumber, exact.value, reset.disabled] = [place * LOG2_LONGEST, this.view.halfLife, true];
    this.legend.replaceChildren(creditLegend(this.view, this.quantity));
    fillTokenRow(this.row, this.view, null);
    if (this.text.box.isConnected) this.fillText();
  }

  stretchColours() {
    if (!this.view) return;
    this.view.isStretched = this.stretch.checked;
    this.view.reaches.influence_weight = this.view.reachOf("influence_weight");
    this.repaint();
    this.legend.replaceChildren(creditLegend(this.view, this.quantity));
  }

  /** The text needs its box's width, so it is filled once the box is in the page. */
  fillText() {
    if (!this.view) return;
    this.text.show(this.view);
    this.repaint();
  }

  setHalfLife(halfLife) {
    this.pending = halfLife;
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.view.setHalfLife(this.pending);
      const { range, exact, reset } = this.slider;
      if (document.activeElement !== range) range.valueAsNumber = Math.log2(this.pending);
      if (document.activeElement !== exact) exact.value = this.pending;
      reset.disabled = this.view.isOwnHalfLife();
      this.repaint();
      if (this.text.current >= 0) fillTokenRow(this.row, this.view, this.text.current);
    });
  }

  repaint() {
    if (!this.view) return;
    this.text.paint(this.view.levels(this.quantity));
    this.strip.show(this.view, this.quantity);
    this.markStrip();
    this.summary.textContent = summarySentence(this.view);
  }

  showToken(index) {
    fillTokenRow(this.row, this.view, index);
    this.markStrip();
  }

  markStrip() {
    this.strip.mark(this.text.inView(), this.text.current);
  }
}

function summarySentence(view) {
  const { mean: centre, deviation: spread, clipped } = view.summary();
  const spreads = `f has mean ${formatNumber(centre, 4)} and standard deviation ${formatNumber(spread)}`;
  const numbers = `${spreads}; for ${formatShare(clipped)} of the tokens exp(F) lies outside its range.`;
  if (!view.objective.future_kl)
    return `${numbers} This run trained without Future-KL, every weight 1: this is what FIPO's would have been.`;
  if (!view.isOwnHalfLife()) return `${numbers} Losses are the run's, at its own half-life.`;
  const error = formatNumber(view.errorAgainstRun(), 2);
  return `${numbers} This is the run's own half-life: its recorded F differs by at most ${error}.`;
}

function responseHead(group, response) {
  const facts = [
    ["answer", response.answer || "none"],
    ["right answer", group.reference],
    ["score", formatNumber(response.score)],
    ["reward", formatNumber(response.reward)],
    ["advantage", formatSigned(response.advantage)],
    ["ended by", response.finish_reason],
    ["tokens", String(response.num_tokens)],
    ...(response.num_left_out ? [["not in the loss", counted(response.num_left_out, "token")]] : []),
  ];
  const prompt = element(
    "details",
    {},
    element("summary", {}, "Prompt"),
    element("pre", { class: "prompt" }, group.prompt),
  );
  prompt.open = group.prompt.length <= 240;
  return [
    element(
      "p",
      { class: "facts" },
      outcome(response.is_right),
      facts.map(([name, value]) => element("span", {}, `${name} `, element("b", {}, value))),
    ),
    prompt,
  ];
}

function creditSection(data) {
  if (!data.runs.some((run) => run.groups.length)) return null;
  const credit = new Credit(data);
  const node = section(
    "credit",
    ["Which tokens got the credit", "Credit"],
    "A response as one update saw it. Future-KL adds up the log-prob shifts of a token and of those after it, each " +
      "halved over a half-life; the influence weight, its exponential within a range, is what the token's advantage " +
      "is multiplied by.",
    credit.node,
  );
  node.credit = credit;
  return node;
}
