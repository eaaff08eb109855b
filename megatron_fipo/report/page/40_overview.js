/* The head of the page: what run this is, and the verdict in words. */

const LEVELS = { bad: "Bad", warning: "Warning", note: "Note", good: "Good" };

function fillMasthead(data) {
  const [first] = data.runs;
  const states = data.runs.map((run) => run.state);
  const finished = states.filter((state) => state === "finished").length;
  const facts =
    data.runs.length === 1
      ? [first.state, `${first.steps.at(-1) ?? 0} of ${counted(first.num_steps, "step")}`, first.label || first.algorithm, first.name]
      : [counted(data.runs.length, "run"), `${finished} finished`];
  document.title = data.title;
  document.getElementById("masthead").replaceChildren(
    element("p", { class: "kicker" }, data.is_live ? "megatron_fipo, live report" : "megatron_fipo, report"),
    element("h1", {}, data.title),
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
    .replaceChildren(element("p", {}, `Written by megatron_fipo ${data.version}. This page needs no network. Plots by Plotly (MIT).`));
}

/** The figure that shows a metric, if there is one. */
function figureOf(metric) {
  return [...document.querySelectorAll("figure[data-metrics]")].find((node) => node.dataset.metrics.split(" ").includes(metric));
}

function goToMetric(metric) {
  const figure = figureOf(metric);
  if (!figure) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  figure.scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "center" });
  figure.querySelector(".plot").focus({ preventScroll: true });
  figure.classList.remove("pointed-at");
  requestAnimationFrame(() => figure.classList.add("pointed-at"));
}

function metricLinks(metrics, data) {
  const drawn = new Set(data.figures.flatMap((figure) => figure.lines.map((line) => line.metric)));
  return element(
    "p",
    { class: "metrics" },
    metrics.map((metric) =>
      drawn.has(metric)
        ? element("button", { type: "button", class: "link", on: { click: () => goToMetric(metric) } }, metric)
        : element("code", {}, metric),
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
      entry.told.push({ run: run.label || run.name, text: finding.text });
    }
  }
  const order = Object.keys(LEVELS);
  return [...merged.values()].sort((a, b) => order.indexOf(a.level) - order.indexOf(b.level));
}

function findingCard(finding, data) {
  const told =
    data.runs.length === 1
      ? element("p", {}, finding.told[0].text)
      : element(
          "details",
          {},
          element("summary", {}, `${finding.told.length} of ${counted(data.runs.length, "run")}`),
          element("ul", {}, finding.told.map(({ run, text }) => element("li", {}, element("b", {}, run), ` ${text}`))),
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
    .map(([level, count]) => `${count} ${LEVELS[level].toLowerCase()}`);
  return section(
    "overview",
    ["Verdict"],
    `${counts.join(", ")}. Each finding names the metric that says so.`,
    element("div", { class: "cards" }, findings.map((finding) => findingCard(finding, data))),
  );
}
