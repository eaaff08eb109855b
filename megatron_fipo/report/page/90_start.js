/* Starts the page: reads its data, fills it, and tells tests and printing how to draw all of it. */

const FORMAT = 1;

function showFatal(message) {
  document.getElementById("sections").replaceChildren(element("p", { class: "fatal", role: "alert" }, message));
}

function startPage() {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  if (data.format !== FORMAT) {
    showFatal(`This page reads data of format ${FORMAT}, and was given format ${data.format}: write the report again.`);
    return;
  }
  page.data = page.opened = data;
  addLevelRules();
  readStripColours();
  fillMasthead(data);
  document.getElementById("sections").replaceChildren();
  fillReport(data);
  fillToolbarIfChanged(data);
  const credit = () => document.getElementById("credit")?.credit;
  const recolour = () => {
    readStripColours();
    credit()?.repaint();
    redrawPlots();
  };
  darkScheme.addEventListener("change", recolour);
  addEventListener("beforeprint", () => {
    credit()?.text.paintAll();
    openFolds();
    drawAllPlots();
  });
  addEventListener("afterprint", setFolds);
  window.report = { data: () => page.data, drawAll: drawAllPlots, recompute, decodeArray, credit, poll };
  if (data.is_live) pollForEver();
}

startPage();
