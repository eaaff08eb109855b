/* What a figure draws: the values of a metric over the chosen axis, of a run or of a group of runs. */

const page = {
  data: null,
  axis: "step",
  grouping: "groups",
  band: "range",
  hidden: new Set(),
  hasNewTraces: false,
};

const AXES = { step: "step", tokens: "response tokens trained on", flops: "FLOPs" };
const BANDS = { range: "smallest and largest of the seeds", interval: "95 % t-interval over the seeds", none: "none" };
const SPARSE = /^evaluation\//; // measured in some steps alone: the line goes on between them

/** What has a colour and an entry of the legend: a group of runs, or one run. */
function units() {
  const { runs, comparison } = page.data;
  const single = (run, index) => ({ key: run.id, label: run.label || run.name, runs: [index] });
  if (!comparison || page.grouping === "runs" || runs.length === 1) return runs.map(single);
  const grouped = comparison.groups.map((group) => ({
    key: `group ${group.label}`,
    label: group.label,
    runs: group.runs,
  }));
  const found = new Set(grouped.flatMap((group) => group.runs));
  return [...grouped, ...runs.map(single).filter((unit) => !found.has(unit.runs[0]))];
}

function shownUnits() {
  return units()
    .map((unit, colour) => ({ ...unit, colour }))
    .filter((unit) => !page.hidden.has(unit.key));
}

/** Index of the run's line that an evaluation or a trace of that step belongs to: the last one not after it. */
function lineAt(run, step) {
  let found = 0;
  run.steps.forEach((other, index) => {
    if (other <= step) found = index;
  });
  return found;
}

function position(run, index) {
  if (page.axis === "step") return run.steps[index];
  const along = run.axes[page.axis];
  return along ? along[index] : null;
}

/** {steps, xs, values} of one run; a missing value is a gap, but for evaluations. */
function runSeries(run, metric) {
  const values = run.metrics[metric];
  if (!values) return { steps: [], xs: [], values: [] };
  const kept = run.steps.map((_, index) => index).filter((index) => !SPARSE.test(metric) || isNumber(values[index]));
  return {
    steps: kept.map((index) => run.steps[index]),
    xs: kept.map((index) => position(run, index)),
    values: kept.map((index) => values[index]),
  };
}

/** Mean over the unit's runs at each step, with the band between `lows` and `highs` where several runs have a value.
    The band stays within `limits`. */
function unitSeries(unit, readOne, limits = null) {
  const parts = unit.runs.map((index) => readOne(page.data.runs[index]));
  if (parts.length === 1) return { ...parts[0], lows: null, highs: null };
  const byStep = new Map();
  for (const part of parts) {
    part.steps.forEach((step, index) => {
      if (!byStep.has(step)) byStep.set(step, { xs: [], values: [] });
      const entry = byStep.get(step);
      if (isNumber(part.values[index])) {
        entry.values.push(part.values[index]);
        entry.xs.push(part.xs[index]);
      }
    });
  }
  const steps = [...byStep.keys()].sort((a, b) => a - b);
  const entries = steps.map((step) => byStep.get(step));
  const bands = entries.map(({ values }) => cut(bandOf(values), limits));
  return {
    steps,
    xs: entries.map(({ xs }, index) =>
      xs.length ? mean(xs.filter(isNumber)) : page.axis === "step" ? steps[index] : null,
    ),
    values: entries.map(({ values }) => mean(values)),
    lows: bands.map((band) => band && band[0]),
    highs: bands.map((band) => band && band[1]),
  };
}

const SHARES = [0, 1];

/** A range without what lies beyond the limits. A t-interval of shares reaches there where its mean is near an end; the
    true share does not, so that the interval holds it as often when it is cut. A logit would have no value at 0 or 1,
    where scores of small sets of problems often are. */
function cut(range, limits) {
  return range && limits ? range.map((end) => within(end, ...limits)) : range;
}

function bandOf(values) {
  if (values.length < 2 || page.band === "none") return null;
  return page.band === "range" ? [Math.min(...values), Math.max(...values)] : studentInterval(values);
}

function hasAxis(axis) {
  return axis === "step" || page.data.runs.some((run) => (run.axes[axis] || []).some(isNumber));
}
