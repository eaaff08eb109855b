/* Where the time went, and what evaluations found. */

function phaseMeans(run) {
  return run.time.phases.map((phase, index) => [phase, mean(run.time.seconds[index].filter(isNumber)) ?? 0]);
}

function timeSentence(run) {
  const phases = phaseMeans(run);
  const whole = phases.reduce((sum, [, seconds]) => sum + seconds, 0);
  const told = [...phases]
    .sort((a, b) => b[1] - a[1])
    .slice(0, 3)
    .filter(([, seconds]) => seconds > 0)
    .map(([phase, seconds]) => `${phase.replaceAll("_", " ")} ${formatShare(seconds / whole)}`);
  return `A step took ${formatSeconds(whole)} on average: ${told.join(", ")}.`;
}

/** Not the first two colours, which are those of groups and runs. */
function phaseColour(order) {
  return lineColour(order + 2);
}

function timedRuns() {
  return page.data.runs.filter((run) => run.time?.phases.length && run.time.seconds[0].length);
}

/** One run: its phases stacked step by step. */
function timeOfOne(run) {
  const xs = run.steps.map((_, index) => position(run, index));
  const phases = run.time.phases.map((phase, order) => ({
    label: phase.replaceAll("_", " "),
    colour: phaseColour(order),
    order,
  }));
  return {
    traces: phases.map(({ colour, order }) => ({
      type: "bar",
      marker: { color: colour },
      x: xs,
      y: run.time.seconds[order],
    })),
    series: phases.map(({ label, colour, order }) => ({
      label,
      colour,
      dash: "",
      values: [{ xs, values: run.time.seconds[order] }],
    })),
    layout: { barmode: "stack", bargap: 0.25 },
    caption: timeSentence(run),
  };
}

/** Several: a bar for each run, of its mean step. */
function timeOfSeveral(runs) {
  const phases = [...new Set(runs.flatMap((run) => run.time.phases))];
  const names = runs.map((run) => run.label || run.name);
  const rows = runs.map((_, index) => index); // not the names, which may be equal
  const seconds = (phase) => runs.map((run) => new Map(phaseMeans(run)).get(phase) ?? 0);
  return {
    traces: phases.map((phase, order) => ({
      type: "bar",
      orientation: "h",
      marker: { color: phaseColour(order) },
      y: rows,
      x: seconds(phase),
    })),
    series: phases.map((phase, order) => ({
      label: phase.replaceAll("_", " "),
      colour: phaseColour(order),
      dash: "",
      values: [],
    })),
    layout: {
      barmode: "stack",
      bargap: 0.3,
      height: 60 + 34 * runs.length,
      xaxis: { title: { text: "seconds of a step" }, showgrid: true },
      yaxis: {
        autorange: "reversed",
        fixedrange: true,
        showgrid: false,
        tickvals: rows,
        ticktext: names.map(plotText),
      },
    },
    caption: `Mean over each run's steps. ${names[0]}: ${timeSentence(runs[0])}`,
  };
}

function timeSection() {
  if (!timedRuns().length) return null;
  const build = () => (timedRuns().length === 1 ? timeOfOne(timedRuns()[0]) : timeOfSeveral(timedRuns()));
  const unit = timedRuns().length === 1 ? "seconds of each step" : "seconds of a mean step";
  const figure = plotFigure({ id: "time", title: "Time by phase", unit, build, isWide: true });
  return section("time", ["Where the time went", "Time"], "", element("div", { class: "figures" }, figure));
}

const SCORES = [
  ["avg", "avg"],
  ["cons", "cons"],
  ["pass", "pass"],
];

function evaluationSeries(run, source, key) {
  const found = run.evaluations.filter((one) => one.source === source).sort((a, b) => a.step - b.step);
  return {
    steps: found.map(({ step }) => step),
    xs: found.map(({ step }) => (page.axis === "step" ? step : position(run, lineAt(run, step)))),
    values: found.map((one) => one[key] ?? null),
  };
}

function evaluationFigure(data, source) {
  const samples = data.runs.flatMap((run) => run.evaluations).find((one) => one.source === source).k;
  const lines = SCORES.map(([key, label]) => ({ metric: key, label: `${label}@${samples}` }));
  const read = (run, key) => evaluationSeries(run, source, key);
  const build = () => {
    const shown = drawLines(units().length === 1 ? lines : lines.slice(0, 1), [], [], read);
    const [unit] = shownUnits();
    if (unit?.runs.length === 1 && shownUnits().length === 1) {
      const run = data.runs[unit.runs[0]];
      const [avg, low, high] = ["avg", "low", "high"].map((key) => read(run, key).values);
      shown.traces[0].error_y = {
        type: "data",
        symmetric: false,
        array: high.map((value, index) => value - avg[index]),
        arrayminus: low.map((value, index) => avg[index] - value),
        thickness: 1.2,
        width: 4,
      };
    }
    return shown;
  };
  return plotFigure({
    id: `evaluation-${source.replace(/[^\w]+/g, "-")}`,
    title: `Evaluation on ${source}`,
    caption:
      units().length === 1
        ? "Bars are 95 % intervals over problems: a difference within them shows nothing."
        : `The mean share of right responses (avg@${samples}).`,
    build,
  });
}

function interval(one) {
  return `${formatNumber(one.avg)} [${formatNumber(one.low)}, ${formatNumber(one.high)}]`;
}

function evaluationTable(data) {
  const rows = data.runs.flatMap((run) => {
    const sources = [...new Set(run.evaluations.map(({ source }) => source))];
    return sources.map((source) => {
      const found = run.evaluations.filter((one) => one.source === source).sort((a, b) => a.step - b.step);
      const [first, last] = [found[0], found.at(-1)];
      const both = (key) =>
        found.length > 1 ? `${formatNumber(first[key])} → ${formatNumber(last[key])}` : formatNumber(last[key]);
      return [
        run.label || run.name,
        source,
        String(first.k),
        interval(first),
        found.length > 1 ? interval(last) : "–",
        both("cons"),
        both("pass"),
        both("response_tokens"),
      ];
    });
  });
  const head = [
    "run",
    "source",
    "k",
    "first avg@k [95 % interval]",
    "last avg@k [95 % interval]",
    "cons@k",
    "pass@k",
    "tokens",
  ];
  return table("First and last evaluation of each run", head, rows);
}

function evaluationSection(data) {
  const sources = [...new Set(data.runs.flatMap((run) => run.evaluations.map(({ source }) => source)))];
  if (!sources.length) return null;
  return section(
    "evaluation",
    ["Evaluation"],
    "Problems that are not trained on.",
    element(
      "div",
      { class: "figures" },
      sources.map((source) => evaluationFigure(data, source)),
    ),
    evaluationTable(data),
  );
}
