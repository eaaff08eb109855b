/* Plots: drawn when they come into view, drawn anew when what they show changes, all of them for printing and tests.

   A plot is {id, node, box, readout, build}. build() returns {traces, layout, series}; series are what the readout
   above the plot reads off: {label, dash, values: [{unit, colour, xs, values}]}. */

const plots = new Map();
const FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif";

const inView = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const plot = plots.get(entry.target.dataset.plot);
      if (!plot) continue;
      plot.isVisible = entry.isIntersecting;
      if (!entry.isIntersecting) continue;
      if (plot.isStale) drawPlot(plot);
      else if (plot.toldX !== cursor.x) showReadout(plot, cursor.x); // it has moved meanwhile
    }
  },
  { rootMargin: "250px" },
);

const widthWatch = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const plot = plots.get(entry.target.dataset.plot);
    const width = Math.round(entry.contentRect.width);
    if (!plot || !plot.series || plot.width === width || width === 0) continue;
    plot.width = width;
    Plotly.Plots.resize(plot.box);
  }
});

/** A figure with its title, readout, plot, caption and numbers; registered, and drawn when it is seen. */
function plotFigure({ id, title, unit = "", caption = "", build, isWide = false }) {
  const box = element("div", {
    class: "plot",
    "data-plot": id,
    tabindex: "0",
    role: "group",
    "aria-roledescription": "plot",
  });
  box.setAttribute("aria-label", `${title}. Left and right arrows move the cursor from step to step.`);
  const readout = element("div", { class: "readout" });
  const numbers = element("details", { class: "numbers" }, element("summary", {}, "Numbers"));
  const heading = element("h3", {}, title, unit ? element("span", { class: "unit" }, ` ${unit}`) : null);
  const node = element(
    "figure",
    { id: `figure-${id}`, class: isWide ? "wide" : null },
    element("header", {}, heading, readout),
    box,
    element("figcaption", {}, element("p", { class: "caption" }, caption), numbers),
  );
  const plot = { id, title, node, box, readout, build, isStale: true, isVisible: false, width: 0 };
  numbers.addEventListener("toggle", () => numbers.open && fillNumbers(plot, numbers));
  listenForCursor(plot);
  forgetPlot(id);
  plots.set(id, plot);
  inView.observe(box);
  widthWatch.observe(box);
  return node;
}

function forgetPlot(id) {
  const plot = plots.get(id);
  if (!plot) return;
  inView.unobserve(plot.box);
  widthWatch.unobserve(plot.box);
  if (plot.series) Plotly.purge(plot.box);
  plots.delete(id);
}

function baseLayout() {
  const ink = styleValue("--ink");
  const muted = styleValue("--muted");
  const axis = {
    gridcolor: styleValue("--grid"),
    linecolor: styleValue("--rule"),
    zerolinecolor: styleValue("--rule"),
    tickfont: { color: muted, size: 11 },
    ticks: "",
    automargin: true,
    exponentformat: "power",
    title: { font: { color: muted, size: 11 }, standoff: 8 },
  };
  return {
    autosize: true,
    height: 230,
    margin: { l: 44, r: 10, t: 6, b: 34 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, size: 11, color: ink },
    showlegend: false,
    hovermode: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    uirevision: page.axis,
    xaxis: {
      ...axis,
      exponentformat: "SI",
      zeroline: false,
      showgrid: false,
      title: { ...axis.title, text: AXES[page.axis] },
    },
    yaxis: { ...axis, nticks: 7 },
  };
}

/** A text for the plotting library, which would read markup in it. */
function plotText(text) {
  return visibleText(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

async function drawPlot(plot) {
  plot.isStale = false;
  const { traces, layout = {}, series = [], caption } = plot.build();
  if (caption !== undefined) plot.node.querySelector(".caption").textContent = visibleText(caption);
  const base = baseLayout();
  const merged = {
    ...base,
    ...layout,
    xaxis: { ...base.xaxis, ...layout.xaxis },
    yaxis: { ...base.yaxis, ...layout.yaxis },
  };
  plot.series = series;
  plot.width = Math.round(plot.box.clientWidth);
  await Plotly.react(plot.box, traces, merged, { displayModeBar: false, showTips: false, responsive: false });
  plot.box.classList.add("drawn");
  showReadout(plot, cursor.x);
  const numbers = plot.node.querySelector(".numbers");
  if (numbers.open) fillNumbers(plot, numbers);
}

/** Marks every plot as out of date; those in view are drawn at once, the others when they are seen. */
function redrawPlots() {
  for (const plot of plots.values()) {
    plot.isStale = true;
    if (plot.isVisible) drawPlot(plot);
  }
}

async function drawAllPlots() {
  for (const plot of [...plots.values()]) if (plot.isStale) await drawPlot(plot);
}

/* One cursor for all plots: where it is, every plot in view tells its values there. */

const cursor = { x: null };

function listenForCursor(plot) {
  plot.box.addEventListener("pointermove", (event) => {
    const area = plot.box.querySelector(".nsewdrag")?.getBoundingClientRect();
    const range = plot.box.layout?.xaxis?.range;
    if (!area || !range || !plot.series?.length) return;
    const part = (event.clientX - area.left) / area.width;
    if (part >= 0 && part <= 1) moveCursor(nearestX(plot, range[0] + part * (range[1] - range[0])), plot);
  });
  plot.box.addEventListener("pointerleave", () => moveCursor(null, plot));
  plot.box.addEventListener("blur", () => moveCursor(null, plot));
  plot.box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    if (plot.isStale) drawPlot(plot); // a key may come before the browser tells that the plot is in view
    if (!plot.series.length) return;
    event.preventDefault();
    const xs = cursorStops(plot);
    const from = cursor.x === null ? (move > 0 ? -1 : xs.length) : xs.indexOf(nearestX(plot, cursor.x));
    moveCursor(xs[Math.max(0, Math.min(xs.length - 1, from + move))], plot);
  });
}

function cursorStops(plot) {
  const all = plot.series.flatMap((line) => line.values.flatMap(({ xs }) => xs.filter(isNumber)));
  return [...new Set(all)].sort((a, b) => a - b);
}

function nearestX(plot, x) {
  return nearest(cursorStops(plot), x);
}

function nearest(xs, x) {
  let found = null;
  for (const other of xs)
    if (isNumber(other) && (found === null || Math.abs(other - x) < Math.abs(found - x))) found = other;
  return found;
}

/** The plot that it is moved in tells its values whether or not it is known to be in view. */
function moveCursor(x, origin) {
  if (cursor.x === x) return;
  cursor.x = x;
  for (const plot of plots.values()) if ((plot.isVisible || plot === origin) && plot.series) showReadout(plot, x);
}

/** Values at the plot's own point that is nearest to the cursor, or the last ones; the line at that point. */
function showReadout(plot, cursorX) {
  plot.toldX = cursorX;
  if (!plot.series.length) return;
  const x = cursorX === null ? null : nearestX(plot, cursorX);
  const at = x === null ? "last" : `${page.axis} ${formatNumber(x, 4)}`;
  plot.readout.replaceChildren(
    ...(plot.series.some(({ values }) => values.length) ? [element("span", { class: "reading" }, at)] : []),
    ...plot.series.map((line) =>
      element(
        "span",
        { class: "reading" },
        line.dash === null ? null : swatch(line.colour || "currentColor", line.dash),
        line.label ? `${line.label} ` : null,
        line.values.map((one) => [
          element(
            "span",
            { class: "value" },
            one.mark ? swatch(one.mark) : null,
            element("b", {}, formatNumber(valueAt(one, x))),
          ),
          " ",
        ]),
      ),
    ),
  );
  placeCursorLine(plot, x);
}

function valueAt({ xs, values }, x) {
  if (x === null) return values.findLast(isNumber);
  const at = nearest(xs, x);
  return at === null ? null : values[xs.lastIndexOf(at)];
}

function placeCursorLine(plot, x) {
  let line = plot.box.querySelector(".cursor");
  const area = plot.box.querySelector(".nsewdrag")?.getBoundingClientRect();
  const range = plot.box.layout?.xaxis?.range;
  const part = x !== null && range ? (x - range[0]) / (range[1] - range[0]) : -1;
  if (!area || part < 0 || part > 1) {
    line?.remove();
    return;
  }
  if (!line) plot.box.append((line = element("div", { class: "cursor" })));
  const origin = plot.box.getBoundingClientRect();
  line.style.left = `${area.left - origin.left + part * area.width}px`;
  line.style.top = `${area.top - origin.top}px`;
  line.style.height = `${area.height}px`;
}

const MOST_ROWS = 200;

/** The plot's series as a table, for readers of numbers and of screens; long ones are thinned evenly. */
function fillNumbers(plot, details) {
  if (!plot.series) drawPlot(plot);
  const columns = plot.series.flatMap((line) =>
    line.values.map((one) => ({ ...one, title: [line.label, one.unit].filter(Boolean).join(", ") || plot.title })),
  );
  const stops = cursorStops(plot);
  const every = Math.ceil(stops.length / MOST_ROWS);
  const rows = stops
    .filter((_, index) => index % every === 0 || index === stops.length - 1)
    .map((x) => [
      formatNumber(x, 6),
      ...columns.map(({ xs, values }) => formatNumber(values[xs.indexOf(x)] ?? null, 4)),
    ]);
  const rest = [...details.children].filter((child) => child.tagName !== "SUMMARY");
  rest.forEach((child) => child.remove());
  details.append(table(plot.title, [AXES[page.axis], ...columns.map(({ title }) => title)], rows));
}
