/* Folds: on a narrow screen figures wait behind a line that names them; on a wide one, and on paper, they are open. */

const narrowScreen = matchMedia("screen and (max-width: 720px)"); // as in page.css
const paper = matchMedia("print");
const FOLDED_FROM = 2; // a single figure is not longer than the line that would stand for it
const MOST_TITLES = 8;
const foldChoices = new Map(); // what the reader opened or closed, by the fold's name

/** Figures in a fold that is open on a narrow screen only where `isFirst`, or where the reader has opened it. */
function folded(name, figures, isFirst = false) {
  const grid = element("div", { class: "figures" }, figures);
  if (figures.length < FOLDED_FROM) return grid;
  const titles = figures.map((figure) => figure.querySelector("h3").firstChild.textContent);
  const more = titles.length > MOST_TITLES ? `, and ${titles.length - MOST_TITLES} more` : "";
  const told = titles.slice(0, MOST_TITLES).join("; ") + more;
  const line = [element("b", {}, counted(figures.length, "figure")), " ", element("span", { class: "titles" }, told)];
  return fold(name, line, grid, { isFirst });
}

function fold(name, summary, content, { isFirst = false, isAlwaysFolded = false }) {
  const line = element("summary", {}, summary);
  const attributes = { "data-fold": name, "data-first": isFirst, "data-always": isAlwaysFolded };
  const node = element("details", { class: "fold", ...attributes }, line, content);
  line.addEventListener("click", () => foldChoices.set(name, !node.open)); // before it is done
  setFold(node);
  return node;
}

function setFold(node) {
  const isChosen = foldChoices.get(node.dataset.fold) ?? node.hasAttribute("data-first");
  node.open = isChosen || paper.matches || !(narrowScreen.matches || node.hasAttribute("data-always"));
}

function setFolds() {
  document.querySelectorAll("details.fold").forEach(setFold);
}

function openFolds() {
  document.querySelectorAll("details.fold").forEach((node) => (node.open = true));
}

/** Opens what a node is folded into, so that it can be shown. */
function unfold(node) {
  const around = node.closest("details.fold");
  if (!around || around.open) return;
  foldChoices.set(around.dataset.fold, true);
  around.open = true;
}

narrowScreen.addEventListener("change", setFolds);
