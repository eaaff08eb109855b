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
        zeroline: false,
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

const EVALUATION = "evaluation"; // the section of the page, and of its figures

/** Scores over training: of one run all of them, with the interval of the first over problems; of several runs the first
    alone, with the band over seeds that is chosen for all figures. */
function evaluationFigure(data, figure) {
  const byRole = (role) => figure.lines.filter((line) => line.role === role);
  const [lines, lows, highs] = ["line", "low", "high"].map(byRole);
  const build = () => {
    const isAlone = data.runs.length === 1;
    const drawn = drawLines(isAlone ? lines : lines.slice(0, 1), [], [], runSeries, limitsOf(figure));
    const caption = isAlone
      ? figure.caption
      : `${lines[0].label}, the mean share of right responses.`;
    const [unit] = shownUnits();
    if (lows.length && drawn.traces.length && shownUnits().length === 1 && unit.runs.length === 1) {
      const run = data.runs[unit.runs[0]];
      const [value, low, high] = [lines[0], lows[0], highs[0]].map(({ metric }) => runSeries(run, metric).values);
      drawn.traces[0].error_y = {
        type: "data",
        symmetric: false,
        array: high.map((end, index) => end - value[index]),
        arrayminus: low.map((end, index) => value[index] - end),
        thickness: 1.2,
        width: 4,
      };
    }
    return { ...drawn, caption };
  };
  const node = plotFigure({ id: figure.id, title: figure.title, caption: figure.caption, build });
  node.dataset.metrics = figure.lines.map((line) => line.metric).join(" ");
  return node;
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
        [interval(first), { class: "number" }],
        [found.length > 1 ? interval(last) : "–", { class: "number" }],
        [both("cons"), { class: "number" }],
        [both("pass"), { class: "number" }],
        [both("response_tokens"), { class: "number" }],
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

function evaluationFigures(data) {
  return data.figures.filter((figure) => figure.section === EVALUATION);
}

function evaluationSection(data) {
  const figures = evaluationFigures(data);
  if (!figures.length) return null;
  const { title, text } = data.sections.find(({ id }) => id === EVALUATION);
  return section(
    EVALUATION,
    [title],
    text,
    element(
      "div",
      { class: "figures" },
      figures.map((figure) => evaluationFigure(data, figure)),
    ),
    evaluationTable(data),
  );
}
