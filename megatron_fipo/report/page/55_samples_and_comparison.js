/* Responses before and after training, the comparison of groups of runs, and what differs in their configurations. */

const FIRST_SAMPLES = 4;

function samplePairs(run) {
  const key = ({ source, prompt }) => JSON.stringify([source, prompt]);
  const before = new Map(run.samples.before.map((sample) => [key(sample), sample]));
  const after = new Map(run.samples.after.map((sample) => [key(sample), sample]));
  return [...new Set([...before.keys(), ...after.keys()])].map((name) => ({
    before: before.get(name),
    after: after.get(name),
  }));
}

const CHANGES = {
  all: ["all prompts", () => true],
  mended: ["wrong before, right after", ({ before, after }) => before && after && !before.is_right && after.is_right],
  broken: ["right before, wrong after", ({ before, after }) => before && after && before.is_right && !after.is_right],
  wrong: ["wrong after", ({ after }) => after && !after.is_right],
};

function outcome(isRight) {
  return element(
    "span",
    { class: `outcome ${isRight ? "right" : "wrong"}` },
    icon(isRight ? "good" : "bad"),
    isRight ? "right" : "wrong",
  );
}

function sampleColumn(when, sample) {
  if (!sample)
    return element(
      "div",
      { class: "sample" },
      element("h4", {}, when),
      element("p", { class: "muted" }, "Not recorded."),
    );
  return element(
    "div",
    { class: "sample" },
    element("h4", {}, when, " ", outcome(sample.is_right)),
    element("pre", { tabindex: "0" }, sample.response),
    element(
      "p",
      { class: "muted" },
      `step ${sample.step}, ${counted(sample.num_tokens, "token")}, answer ${sample.answer || "none"}`,
    ),
  );
}

function samplePair({ before, after }) {
  const one = before || after;
  return element(
    "article",
    { class: "pair" },
    element("pre", { class: "prompt" }, one.prompt),
    element("p", { class: "muted" }, `${one.source}, right answer: ${one.reference}`),
    element("div", { class: "columns" }, sampleColumn("Before", before), sampleColumn("After", after)),
  );
}

function samplesSection(data) {
  const withSamples = data.runs.filter((run) => run.samples.before.length || run.samples.after.length);
  if (!withSamples.length) return null;
  const chosen = { run: withSamples[0], change: "all", most: FIRST_SAMPLES };
  const list = element("div", { class: "pairs", "aria-live": "polite" });
  const fill = () => {
    const found = samplePairs(chosen.run).filter(CHANGES[chosen.change][1]);
    const more = element("button", { type: "button" }, `Show all ${found.length}`);
    more.addEventListener("click", () => {
      chosen.most = Infinity;
      fill();
    });
    list.replaceChildren(
      ...found.slice(0, chosen.most).map(samplePair),
      ...(found.length > chosen.most ? [more] : []),
      ...(found.length ? [] : [element("p", { class: "muted" }, "No such prompt.")]),
    );
  };
  const choose = (key) => (value) => {
    chosen[key] = value;
    chosen.most = FIRST_SAMPLES;
    fill();
  };
  const controls = element(
    "div",
    { class: "controls" },
    withSamples.length > 1
      ? selection(
          "Run",
          withSamples.map((run) => [run, run.label || run.name]),
          chosen.run,
          choose("run"),
        )
      : null,
    selection(
      "Show",
      Object.entries(CHANGES).map(([key, [text]]) => [key, text]),
      "all",
      choose("change"),
    ),
  );
  fill();
  return section(
    "samples",
    ["Responses before and after", "Responses"],
    "The same prompts, answered before training and after it.",
    controls,
    list,
  );
}

/** A point with its interval on a common scale from `low` to `high`; the numbers stand beside it. */
function intervalBar({ mean: centre, low, high }, [from, to], { zero = null, colour = null }) {
  const along = (value) => `${(100 * (value - from)) / (to - from || 1)}%`;
  const bar = element("span", { class: "interval", "aria-hidden": "true" });
  if (colour) bar.style.setProperty("--tone", colour);
  const mark = (kind, place) => {
    const node = element("i", { class: kind });
    Object.assign(node.style, place);
    bar.append(node);
  };
  if (zero !== null) mark("zero", { left: along(zero) });
  if (isNumber(low) && isNumber(high))
    mark("range", { left: along(low), width: `${(100 * (high - low)) / (to - from || 1)}%` });
  mark("dot", { left: along(centre) });
  return bar;
}

function bounds(entries, more = []) {
  const values = entries
    .flatMap(({ mean: centre, low, high }) => [centre, low, high])
    .concat(more)
    .filter(isNumber);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const margin = 0.08 * (most - least || 1);
  return [least - margin, most + margin];
}

function withInterval({ mean: centre, low, high }, format = formatNumber) {
  const range = isNumber(low) && isNumber(high) ? ` [${format(low)}, ${format(high)}]` : " (no interval)";
  return format(centre) + range;
}

/** Intervals of shares, and of differences of shares, within what these can be. */
function cutInterval(one, metric, limits) {
  const isShare = page.data.figures.some((figure) => figure.is_share && figure.lines.some((line) => line.metric === metric));
  if (!isShare || !isNumber(one.low)) return one;
  const [low, high] = cut([one.low, one.high], limits);
  return { ...one, low, high };
}

function scoreRows({ metric, groups: told }) {
  const groups = told.map((group) => cutInterval(group, metric, SHARES));
  const scale = bounds(groups);
  const colour = (label) =>
    `var(--line-${(page.data.comparison.groups.findIndex((group) => group.label === label) % NUM_LINE_COLOURS) + 1})`;
  return groups.map((group, index) => [
    index === 0 ? element("code", {}, metric) : "",
    group.label,
    [withInterval(group), { class: "number" }],
    [intervalBar(group, scale, { colour: colour(group.label) }), { class: "whole" }],
    [group.values.map((value) => formatNumber(value)).join(", "), { class: "whole", "data-label": "each seed" }],
  ]);
}

const CLEAR = "clear of 0?";

function differenceRows({ metric, differences: told }) {
  const differences = told.map((one) => cutInterval(one, metric, [-1, 1]));
  const scale = bounds(differences, [0]);
  return differences.map((one, index) => {
    const isClear = isNumber(one.low) && isNumber(one.high) && (one.low > 0 || one.high < 0);
    const pairs = one.paired_by === "nothing" ? "nothing" : counted(one.num_pairs, one.paired_by);
    return [
      index === 0 ? element("code", {}, metric) : "",
      `${one.a} − ${one.b}`,
      [withInterval(one, formatSigned), { class: "number" }],
      [intervalBar(one, scale, { zero: 0 }), { class: "whole" }],
      [pairs, { class: "number whole", "data-label": "paired by" }],
      [isNumber(one.low) ? (isClear ? "yes" : "no") : "not known", { class: "number whole", "data-label": CLEAR }],
    ];
  });
}

function comparisonSection(data) {
  const { comparison } = data;
  if (!comparison) return null;
  const members = comparison.groups.map(
    ({ label, runs }) =>
      `${label}: ${counted(runs.length, "run")} (seeds ${runs.map((index) => data.runs[index].seed).join(", ")})`,
  );
  const differences = comparison.scores.flatMap(differenceRows);
  return section(
    "comparison",
    ["Comparison"],
    `${members.join("; ")}. Runs of a group differ in their seed alone.`,
    comparison.note ? warning(comparison.note) : null,
    table(
      "Final scores, with 95 % intervals over seeds",
      ["score", "group", "mean", "", "each seed"],
      comparison.scores.flatMap(scoreRows),
      { class: "stacked" },
    ),
    differences.length
      ? table(
          "Paired differences, with 95 % intervals",
          ["score", "difference", "mean", "", "paired by", CLEAR],
          differences,
          { class: "stacked" },
        )
      : null,
    configDifferences(data),
  );
}

const SHADOW = /^objective\.shadow(\.|$)/; // measured beside training, which they do not change

function configDifferences({ comparison, runs }) {
  if (!comparison.config_differences.length) return element("p", {}, "The configurations do not differ.");
  const said = (value) =>
    value === null || value === undefined ? "–" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const rowsOf = (differences) =>
    differences.map(({ key, values }) => [element("code", {}, key), ...values.map(said)]);
  const head = ["key", ...runs.map((run) => run.label || run.name)];
  const isShadow = ({ key }) => SHADOW.test(key);
  const shadows = comparison.config_differences.filter(isShadow);
  const others = comparison.config_differences.filter((difference) => !isShadow(difference));
  return [
    others.length ? table("What differs in the configurations", head, rowsOf(others)) : null,
    shadows.length
      ? fold(
          "shadow-differences",
          `Shadow settings, which change nothing in training, differ in ${counted(shadows.length, "key")}`,
          table("Shadow settings", head, rowsOf(shadows)),
          { isAlwaysFolded: true },
        )
      : null,
  ];
}

function configSection(data) {
  const said = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const lists = data.runs
    .filter((run) => Object.keys(run.config || {}).length)
    .map((run) =>
      element(
        "details",
        {},
        element("summary", {}, `${run.label || run.name}: ${counted(Object.keys(run.config).length, "key")}`),
        table(
          `Configuration of ${run.name}`,
          ["key", "value"],
          Object.entries(run.config).map(([key, value]) => [element("code", {}, key), said(value)]),
        ),
      ),
    );
  return lists.length ? section("configuration", ["Configuration"], "As the run resolved it.", lists) : null;
}
