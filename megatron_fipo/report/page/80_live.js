/* A live report asks for its data every few seconds and changes only what has changed. */

const POLL_MS = 3000;

/* The parts of the page, in order: the data that each is made of, and how. A part is made anew when its data differ. */
const PARTS = [
  ["overview", (data) => [data.figures, data.runs.map(({ verdict, label }) => [verdict, label])], overviewSection],
  ["comparison", (data) => data.comparison, comparisonSection],
  [
    EVALUATION,
    (data) => [evaluationFigures(data).map(({ lines }) => lines), data.runs.map(({ evaluations }) => evaluations)],
    evaluationSection,
  ],
  ["credit", () => null, creditSection],
  ["time", (data) => data.runs.map(({ time }) => time.phases), timeSection],
  ["samples", (data) => data.runs.map(({ samples }) => samples), samplesSection],
  ["analysis", (data) => data.runs.map(({ analysis }) => analysis), analysisSection],
  ["configuration", (data) => data.runs.map(({ config }) => config), configSection],
];
const NUM_AHEAD = 4; // parts that stand before the figures of metrics
const known = new Map();

function hasChanged(key, value) {
  const text = JSON.stringify(value);
  const is = known.get(key) !== text;
  known.set(key, text);
  return is;
}

/** Puts the new sections in, takes away those that are gone; leaves the others, and the reader's place, alone. */
function fillReport(data) {
  const report = document.getElementById("sections");
  const shape = data.figures.map((figure) => [figure.id, figure.section, figure.lines]);
  if (hasChanged("figures", [data.sections, shape])) {
    document.querySelectorAll("main > .metrics-figures").forEach((node) => node.remove());
    const fresh = figureSections(data).filter(Boolean);
    fresh.forEach((node) => node.classList.add("metrics-figures"));
    report.prepend(...fresh);
  }
  for (const [id, needs, make] of PARTS) {
    if (!hasChanged(id, needs(data))) continue;
    const old = document.getElementById(id);
    const fresh = make(data);
    if (old && fresh) old.replaceWith(fresh);
    else if (old) old.remove();
    else if (fresh) report.append(fresh);
    fresh?.credit?.fillText();
  }
  keepOrder(report);
}

/** Sections that came later go to their places; one that is in its place is not touched, so that nothing jumps. */
function keepOrder(report) {
  const [ahead, behind] = [PARTS.slice(0, NUM_AHEAD), PARTS.slice(NUM_AHEAD)].map((parts) =>
    parts.map(([id]) => document.getElementById(id)),
  );
  const wanted = [...ahead, ...document.querySelectorAll("main > .metrics-figures"), ...behind].filter(Boolean);
  wanted.forEach((node, index) => {
    if (report.children[index] !== node) report.insertBefore(node, report.children[index]);
  });
}

/** Traces keep to the page's first data, whose tokens it holds; new ones need it loaded again. */
function takeData(fresh) {
  const traced = (data) =>
    JSON.stringify(data.runs.map(({ groups }) => groups.map((group) => [group.step, group.update])));
  page.hasNewTraces = traced(fresh) !== traced(page.opened);
  const byId = new Map(page.opened.runs.map((run) => [run.id, run.groups]));
  page.data = { ...fresh, runs: fresh.runs.map((run) => ({ ...run, groups: byId.get(run.id) || [] })) };
  const progress = page.data.runs.map(({ state, steps }) => [state, steps.length]);
  if (hasChanged("masthead", [page.data.title, page.data.written_at, progress])) fillMasthead(page.data);
  fillReport(page.data);
  fillToolbarIfChanged(page.data);
  redrawPlots();
}

function fillToolbarIfChanged(data) {
  const sections = [...document.querySelectorAll("main > section")].map(({ id }) => id);
  const axes = Object.keys(AXES).map((axis) => [hasAxis(axis), axisNote(data, axis)]);
  if (hasChanged("toolbar", [sections, data.runs.map(({ id, label }) => [id, label]), axes]))
    fillToolbar(data);
}

function setLiveState(text) {
  const node = document.getElementById("live");
  if (node && node.textContent !== text) node.textContent = text;
}

/** The server's data as text, or null with the reason on the page. */
async function askForData() {
  try {
    const answer = await fetch("data.json", { cache: "no-cache" });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    return await answer.text();
  } catch (error) {
    setLiveState(`not live: ${error.message}; asking again`);
    return null;
  }
}

async function poll() {
  const text = await askForData();
  if (text === null) return;
  if (hasChanged("data.json", text)) takeData(JSON.parse(text));
  setLiveState(page.hasNewTraces ? "live; there are new traces: load the page again to read them" : "live");
}

async function pollForEver() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (!document.hidden) await poll();
  }
}
