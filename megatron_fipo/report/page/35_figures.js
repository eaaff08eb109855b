/* The figures of metrics over training, by the report's table of figures, and trends of analyses. */

const FEW_POINTS = 25;

function lineTrace(xs, values, colour, dash, width = 1.8) {
  const isShort = values.filter(isNumber).length <= FEW_POINTS;
  return {
    type: "scatter",
    x: xs,
    y: values,
    mode: isShort ? "lines+markers" : "lines",
    line: { color: colour, width, dash },
    marker: { color: colour, size: 4.5 },
    hoverinfo: "skip",
  };
}

/** The area between two lines, as one closed outline; steps without both are passed over. */
function bandTrace(xs, lows, highs, colour, opacity = 0.16) {
  const kept = xs.map((_, index) => index).filter((index) => isNumber(lows[index]) && isNumber(highs[index]));
  const back = [...kept].reverse();
  return {
    type: "scatter",
    x: [...kept.map((index) => xs[index]), ...back.map((index) => xs[index])],
    y: [...kept.map((index) => highs[index]), ...back.map((index) => lows[index])],
    mode: "lines",
    fill: "toself",
    fillcolor: faint(colour, opacity),
    line: { width: 0, color: colour },
    hoverinfo: "skip",
  };
}

/** Traces and series of lines [{metric, label}], read by `read(run, metric)`, for all units that are shown. */
function drawLines(lines, lows, highs, read, limits = null) {
  const chosen = shownUnits();
  const isAlone = units().length === 1;
  const hasRange = chosen.length === 1 && lows.length > 0; // then no second band, over seeds, is drawn in it
  const bands = [];
  const traces = [];
  const series = lines.map((line, order) => ({
    label: lines.length > 1 ? line.label : "",
    colour: isAlone ? lineColour(order) : null,
    dash: lines.length > 1 || isAlone ? DASHES[isAlone ? 0 : order % DASHES.length][1] : null,
    values: [],
  }));
  for (const unit of chosen) {
    lines.forEach((line, order) => {
      const colour = isAlone ? lineColour(order) : lineColour(unit.colour);
      const data = unitSeries(unit, (run) => read(run, line.metric), limits);
      if (!data.values.some((value, index) => isNumber(value) && isNumber(data.xs[index]))) return;
      if (data.lows && lines.length === 1 && !hasRange) bands.push(bandTrace(data.xs, data.lows, data.highs, colour));
      traces.push(lineTrace(data.xs, data.values, colour, DASHES[isAlone ? 0 : order % DASHES.length][0]));
      series[order].values.push({
        unit: isAlone ? "" : unit.label,
        mark: isAlone ? null : colour,
        xs: data.xs,
        values: data.values,
      });
    });
  }
  if (hasRange) {
    lows.forEach((low, index) => {
      const [lower, upper] = [low, highs[index]].map((line) => unitSeries(chosen[0], (run) => read(run, line.metric)));
      bands.push(
        bandTrace(lower.xs, lower.values, upper.values, isAlone ? lineColour(0) : lineColour(chosen[0].colour), 0.13),
      );
    });
  }
  return { traces: [...bands, ...traces], series: series.filter((line) => line.values.length) };
}

const [ONE_DECADE, FEW_DECADES, MOST_TICKS] = [0.7, 2, 6];

/** A logarithmic axis: with powers of ten alone where there are many, else with 2 and 5 between them, or more where all
    values are close; a linear one that does not go below 0 where no value does. */
function verticalAxis(isLog, traces) {
  if (isLog) {
    const positive = traces.flatMap(({ y }) => y.filter((value) => isNumber(value) && value > 0));
    const decades = Math.log10(largest(positive) / smallest(positive));
    if (decades > FEW_DECADES) return { type: "log", dtick: Math.ceil(decades / MOST_TICKS) };
    return { type: "log", tickformat: "~g", ...(decades > ONE_DECADE ? { dtick: "D2" } : {}) };
  }
  const isPositive = traces.every(({ y }) => y.every((value) => !isNumber(value) || value >= 0));
  return { rangemode: isPositive ? "nonnegative" : "normal" };
}

/** Bands that reach to 0 or below end at the least value that is drawn: a logarithmic axis has no place for 0. */
function keepPositive(traces) {
  const least = smallest(traces.flatMap(({ y }) => y.filter((value) => isNumber(value) && value > 0)));
  for (const band of traces.filter(({ fill }) => fill)) band.y = band.y.map((value) => Math.max(value, least));
}

function limitsOf(figure) {
  return figure.is_share ? SHARES : null;
}

/** What the shaded range is, in a figure of one run or group another thing than in one of several. */
function shadeSentence(low, high, traces) {
  if (!traces.some(({ fill }) => fill)) return "";
  if (shownUnits().length === 1) return ` The shaded range is from ${low.label} to ${high.label}.`;
  return page.band === "range"
    ? " The shaded range is from the smallest to the largest of the seeds."
    : " The shaded range is the 95 % t-interval over the seeds.";
}

function metricFigure(figure) {
  const byRole = (role) => figure.lines.filter((line) => line.role === role);
  const [lines, lows, highs] = ["line", "low", "high"].map(byRole);
  const pairs = Math.min(lows.length, highs.length);
  const node = plotFigure({
    id: figure.id,
    title: figure.title,
    unit: figure.unit,
    caption: figure.caption,
    build: () => {
      const drawn = drawLines(lines, lows.slice(0, pairs), highs.slice(0, pairs), runSeries, limitsOf(figure));
      if (figure.log) keepPositive(drawn.traces);
      const caption = figure.caption + (pairs ? shadeSentence(lows[0], highs[0], drawn.traces) : "");
      return { ...drawn, caption, layout: { yaxis: verticalAxis(figure.log, drawn.traces) } };
    },
  });
  node.dataset.metrics = figure.lines.map((line) => line.metric).join(" ");
  return node;
}

/** The sections of figures of metrics; that of evaluations has more than figures, and is made elsewhere. */
function figureSections(data) {
  return data.sections
    .filter(({ id }) => id !== EVALUATION)
    .map(({ id, title, text }, order) => {
      const figures = data.figures.filter((figure) => figure.section === id).map(metricFigure);
      return figures.length ? section(`section-${id}`, [title], text, folded(`section-${id}`, figures, order === 0)) : null;
    });
}

/* Analyses: their points have steps of their own. */

function analysisSeries(name, source, where) {
  return (run) => {
    const points = (run.analysis?.points || []).filter((point) => point.source === source && point.where === where);
    const sorted = [...points].sort((a, b) => a.step - b.step);
    return {
      steps: sorted.map(({ step }) => step),
      xs: sorted.map(({ step }) => (page.axis === "step" ? step : position(run, lineAt(run, step)))),
      values: sorted.map(({ values }) => values[name] ?? null),
    };
  };
}

function analysisSection(data) {
  const analysed = data.runs.filter((run) => run.analysis);
  if (!analysed.length) return null;
  const names = new Map(analysed.flatMap((run) => Object.entries(run.analysis.names)));
  const points = analysed.flatMap((run) => run.analysis.points);
  const places = [...new Set(points.map(({ source, where }) => JSON.stringify([source, where])))].map((text) =>
    JSON.parse(text),
  );
  const isNothing = ([name]) => points.every(({ values }) => !values[name]);
  const figures = [...names].filter((entry) => !isNothing(entry)).map(([name, { title, caption }]) => {
    const lines = places.map(([source, where]) => ({ metric: [source, where], label: `${source}, ${where}` }));
    return plotFigure({
      id: `analysis-${name.replace(/[^\w]+/g, "-")}`,
      title,
      caption,
      build: () => drawLines(lines, [], [], (run, [source, where]) => analysisSeries(name, source, where)(run)),
    });
  });
  const nothings = [...names].filter(isNothing).map(([, { title }]) => title);
  const text =
    "Counts over the responses of traces and evaluations, by patterns whose precision was measured. " +
    "They tell what changes in the responses, not why.";
  return section(
    "analysis",
    ["What the responses consist of", "Analysis"],
    text,
    folded("analysis", figures),
    nothings.length ? element("p", { class: "muted nothings" }, `Nothing at any step: ${nothings.join("; ")}.`) : null,
  );
}
