/* Which response the credit view shows: run, step and update, group, filters, and the list of the group's responses. */

const JUDGEMENTS = { all: "right and wrong", right: "right", wrong: "wrong" };
const ORDERS = { sampled: "as sampled", longest: "longest", reweighted: "most re-weighted" };
const ALL_GROUPS = -1;

function hasLeftOut(response) {
  return response.left_out !== "" || response.num_left_out > 0;
}

/** How many of a run's traced responses the page holds, where that is not all. */
function tracesSentence({ num_responses: all, num_left_out: numLeftOut }) {
  if (!numLeftOut) return "";
  const shown = `This page holds ${all - numLeftOut} of this run's ${counted(all, "traced response")}`;
  return `${shown}, of the newest and the earliest steps first: --max-trace-tokens sets how many.`;
}

/* What is opened first is where there is most to see: the most re-weighted response. */

const weighed = (response) => (response.tokens === null ? -1 : (response.mean_weight_deviation ?? 0));
const weighedGroup = ({ responses }) => Math.max(...responses.map(weighed));

/** The first one of those with the largest deviation of weights from 1. */
function mostReweighted(these, deviationOf) {
  return these.reduce((best, one) => (deviationOf(one) > deviationOf(best) ? one : best));
}

class CreditChoice {
  constructor(data, opened) {
    this.runs = data.runs.filter((run) => run.groups.length);
    this.opened = opened;
    Object.assign(this, { judgement: "all", order: "sampled", leftOutOnly: false });
    this.controls = element("div", { class: "controls" });
    this.list = element("div", { class: "responses", role: "group", "aria-label": "The group's responses" });
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    this.chooseRun(this.runs[0]);
  }

  chooseRun(run) {
    this.run = run;
    this.traces = [...new Map(run.groups.map((group) => [`${group.step} ${group.update}`, group])).values()];
    const newest = run.groups.filter(({ step }) => step === this.traces.at(-1).step);
    this.chooseTrace(mostReweighted(newest.reverse(), weighedGroup));
  }

  chooseTrace({ step, update }) {
    this.trace = { step, update };
    this.groups = this.run.groups.filter((group) => group.step === step && group.update === update);
    const mixed = this.groups.filter(
      ({ responses }) => new Set(responses.map(({ is_right: isRight }) => isRight)).size > 1,
    );
    const group = mostReweighted(mixed.length ? mixed : this.groups, weighedGroup);
    this.group = this.groups.indexOf(group);
    this.current = mostReweighted(group.responses, weighed);
    this.fill();
  }

  fill() {
    const traceOf = ({ step, update }) => this.traces.find((other) => other.step === step && other.update === update);
    const told = ({ step, update, num_updates: updates }) => `step ${step}, update ${update + 1} of ${updates}`;
    const groupTitle = (group) => {
      const right = group.responses.filter(({ is_right: isRight }) => isRight).length;
      return `${group.source} ${group.prompt_id}: ${right} of ${group.responses.length} right`;
    };
    const groups = [
      ...this.groups.map((group, index) => [index, groupTitle(group)]),
      ...(this.groups.length > 1 ? [[ALL_GROUPS, "all groups of this update"]] : []),
    ];
    const leftOut = element("input", { type: "checkbox", checked: this.leftOutOnly });
    leftOut.addEventListener("change", () => this.change("leftOutOnly", leftOut.checked));
    const entries = (names) => Object.entries(names);
    this.controls.replaceChildren(
      this.runs.length > 1
        ? selection(
            "Run",
            this.runs.map((run) => [run, run.label || run.name]),
            this.run,
            (run) => this.chooseRun(run),
          )
        : "",
      selection(
        "Trace",
        this.traces.map((trace) => [trace, told(trace)]),
        traceOf(this.trace),
        (trace) => this.chooseTrace(trace),
      ),
      selection("Group", groups, this.group, (group) => this.change("group", group)),
      selection("Responses", entries(JUDGEMENTS), this.judgement, (judgement) => this.change("judgement", judgement)),
      selection("Order", entries(ORDERS), this.order, (order) => this.change("order", order)),
      element("label", { class: "check" }, leftOut, "with tokens left out"),
      element("p", { class: "muted traced" }, tracesSentence(this.run.traces)),
    );
    this.fillList();
  }

  change(key, value) {
    this[key] = value;
    this.fillList();
  }

  found() {
    const groups = this.group === ALL_GROUPS ? this.groups : [this.groups[this.group]];
    const all = groups.flatMap((group) => group.responses.map((response) => ({ group, response })));
    const kept = all.filter(
      ({ response }) =>
        (this.judgement === "all" || (this.judgement === "right") === response.is_right) &&
        (!this.leftOutOnly || hasLeftOut(response)),
    );
    if (this.order === "longest") kept.sort((a, b) => b.response.num_tokens - a.response.num_tokens);
    if (this.order === "reweighted") {
      const weights = new Map(kept.map(({ response }) => [response, reweighting(response, this.run.objective) ?? -1]));
      kept.sort((a, b) => weights.get(b.response) - weights.get(a.response));
    }
    return kept;
  }

  fillList() {
    const found = this.found();
    const longest = Math.max(1, ...found.map(({ response }) => response.num_tokens));
    this.items = found.map((entry) => ({ ...entry, button: this.responseButton(entry, longest) }));
    this.list.replaceChildren(
      ...this.items.map(({ button }) => button),
      ...(found.length ? [] : [element("p", { class: "muted" }, "No response of this group is so.")]),
    );
    const same = this.items.find(({ response }) => response === this.current);
    this.open(same || this.items[0] || null);
  }

  responseButton({ group, response }, longest) {
    const bar = element("span", { class: `bar ${response.is_right ? "right" : "wrong"}`, "aria-hidden": "true" });
    bar.style.width = `${(100 * response.num_tokens) / longest}%`;
    const about = [counted(response.num_tokens, "token"), `A ${formatSigned(response.advantage)}`];
    const isWeighed = this.order === "reweighted";
    const place = this.group === ALL_GROUPS ? `${group.source} ${group.prompt_id}, ` : "";
    const button = element(
      "button",
      { type: "button", class: "response-choice" },
      element("span", { class: "name" }, `${place}#${response.sample_index} `, outcome(response.is_right)),
      bar,
      element("span", { class: "about" }, about.join(" · ")),
      isWeighed
        ? element(
            "span",
            { class: "about" },
            `mean |f − 1| ${formatNumber(reweighting(response, this.run.objective))}`,
          )
        : null,
      response.left_out
        ? element("span", { class: "about" }, `left out: ${response.left_out.replaceAll("_", " ")}`)
        : null,
    );
    button.addEventListener("click", () => this.open(this.items.find((item) => item.button === button)));
    return button;
  }

  open(item) {
    this.current = item ? item.response : null;
    for (const { button, response } of this.items)
      button.setAttribute("aria-current", String(response === this.current));
    this.opened(this.run, item?.group ?? null, this.current);
  }

  onKey(event) {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const from = this.items.findIndex(({ button }) => button === document.activeElement);
    if (!move || from < 0) return;
    event.preventDefault();
    const next = this.items[within(from + move, 0, this.items.length - 1)];
    next.button.focus();
    this.open(next);
  }
}
