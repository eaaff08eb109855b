/* The head of the page: what run this is, and the verdict in words. */

const PLURALS = { bad: "bad", warning: "warnings", note: "notes", good: "good" };
const LEVELS = { bad: "Bad", warning: "Warning", note: "Note", good: "Good" };

function fillMasthead(data) {
  const [first] = data.runs;
  const states = data.runs.map((run) => run.state);
  const finished = states.filter((state) => state === "finished").length;
  const facts =
    data.runs.length === 1
      ? [
          first.state,
          `${first.steps.at(-1) ?? 0} of ${counted(first.num_steps, "step")}`,
          first.label || first.algorithm,
          first.name === data.title ? null : first.name,
        ]
      : [counted(data.runs.length, "run"), `${finished} finished`];
  document.title = data.title;
  document.getElementById("masthead").replaceChildren(
    element("p", { class: "kicker" }, data.is_live ? "megatron_fipo, live report" : "megatron_fipo, report"),
    element(
      "h1",
      {},
      data.title.split(/(?<=,) /).map((name) => [element("span", {}, name), " "]), // a line breaks between names
    ),
    element(
      "p",
      { class: "facts" },
      facts.filter(Boolean).map((fact) => element("span", {}, fact)),
      element("span", {}, `written ${data.written_at}`),
      data.is_live ? element("span", { id: "live", role: "status" }, "live") : null,
    ),
  );
  document
    .getElementById("colophon")
    .replaceChildren(
      element("p", {}, `Written by megatron_fipo ${data.version}. This page needs no network. Plots by Plotly (MIT).`),
    );
}

/** The figure that shows a metric, if there is one. */
function figureOf(metric) {
  return [...document.querySelectorAll("figure[data-metrics]")].find((node) =>
    node.dataset.metrics.split(" ").includes(metric),
  );
}

function goToMetric(metric) {
  const figure = figureOf(metric);
  if (!figure) return;
  unfold(figure);
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  figure.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "center" });
  figure.querySelector(".plot").focus({ preventScroll: true });
  figure.classList.remove("pointed-at");
  requestAnimationFrame(() => figure.classList.add("pointed-at"));
}

/** A metric's name with places where a line may break. */
function breakable(metric) {
  return metric.split(/(?<=[/_])/).flatMap((part) => [part, element("wbr")]);
}

function metricLinks(metrics, data) {
  const drawn = new Set(data.figures.flatMap((figure) => figure.lines.map((line) => line.metric)));
  return element(
    "p",
    { class: "metrics" },
    metrics.map((metric) =>
      drawn.has(metric)
        ? element(
            "button",
            { type: "button", class: "link", on: { click: () => goToMetric(metric) } },
            breakable(metric),
          )
        : element("code", {}, breakable(metric)),
    ),
  );
}

/** Findings of the same level and title are one card, with each run's sentence in it. */
function mergedFindings(runs) {
  const merged = new Map();
  for (const run of runs) {
    for (const finding of run.verdict) {
      const key = JSON.stringify([finding.level, finding.title]);
      if (!merged.has(key)) merged.set(key, { ...finding, metrics: new Set(), told: [] });
      const entry = merged.get(key);
      finding.metrics.forEach((metric) => entry.metrics.add(metric));
      entry.told.push({ run, text: finding.text });
    }
  }
  const order = Object.keys(LEVELS);
  return [...merged.values()].sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
}

/** In how many runs a finding was made, by group where there are groups. */
function whichRuns({ told }, { runs, comparison }) {
  if (!comparison) return `${told.length} of ${counted(runs.length, "run")}`;
  const found = new Set(told.map(({ run }) => run.id));
  const counts = comparison.groups.map(({ label, runs: members }) => [
    label,
    members.filter((index) => found.has(runs[index].id)).length,
    members.length,
  ]);
  return counts
    .filter(([, count]) => count)
    .map(([label, count, all]) => `${label}: ${count} of ${counted(all, "run")}`)
    .join("; ");
}

function findingCard(finding, data) {
  const told =
    data.runs.length === 1
      ? element("p", {}, finding.told[0].text)
      : element(
          "details",
          {},
          element("summary", {}, whichRuns(finding, data)),
          element(
            "ul",
            {},
            finding.told.map(({ run, text }) => element("li", {}, element("b", {}, run.label || run.name), ` ${text}`)),
          ),
        );
  return element(
    "article",
    { class: `card ${finding.level}` },
    element("p", { class: "level" }, icon(finding.level), LEVELS[finding.level]),
    element("h3", {}, finding.title),
    told,
    metricLinks([...finding.metrics], data),
  );
}

function overviewSection(data) {
  const findings = mergedFindings(data.runs);
  if (!findings.length) return null;
  const counts = Object.keys(LEVELS)
    .map((level) => [level, findings.filter((finding) => finding.level === level).length])
    .filter(([, count]) => count)
    .map(([level, count]) => `${count} ${count === 1 ? LEVELS[level].toLowerCase() : PLURALS[level]}`);
  return section(
    "overview",
    ["Verdict"],
    `${counts.join(", ")}. Each finding names the metric that says so.`,
    element(
      "div",
      { class: "cards" },
      findings.map((finding) => findingCard(finding, data)),
    ),
  );
}
