/* The bar that stays in view: the sections, the axis of all figures, and the runs that they show. */

function fillToolbar(data) {
  const open = (node) => node.querySelectorAll("details.fold:not([data-always])").forEach((one) => unfold(one.lastChild));
  const link = (node) => element("a", { href: `#${node.id}`, on: { click: () => open(node) } }, node.dataset.short);
  const ofMetrics = [...document.querySelectorAll("main > .metrics-figures")];
  const others = [...document.querySelectorAll("main > section:not(.metrics-figures)")];
  const before = others.filter(
    (node) => ofMetrics[0] && node.compareDocumentPosition(ofMetrics[0]) & Node.DOCUMENT_POSITION_FOLLOWING,
  );
  const links = [
    before.map(link),
    ofMetrics.length ? figureMenu(ofMetrics.map(link)) : [],
    others.slice(before.length).map(link),
  ];
  const note = element("p", { class: "axis-note", role: "status" });
  const toolbar = document.getElementById("toolbar");
  toolbar.classList.toggle("two-rows", data.runs.length > 1);
  toolbar.replaceChildren(
    element("div", { class: "links" }, links),
    element(
      "div",
      { class: "switches" },
      segmented("Over", AXIS_BUTTONS, page.axis, (axis) => chooseAxis(data, axis, note)),
      data.runs.length > 1 ? runSwitches(data) : null,
    ),
    note,
  );
  note.textContent = visibleText(axisNote(data, page.axis));
}

/** What is led to stands below the bar, however high that is. */
new ResizeObserver(([{ target }]) => {
  document.documentElement.style.scrollPaddingTop = `${target.offsetHeight + 8}px`;
}).observe(document.getElementById("toolbar"));

const AXIS_BUTTONS = [
  ["step", "Steps"],
  ["tokens", "Tokens"],
  ["flops", "FLOPs"],
];

/** An axis that no run has is not taken, and the reason is said where it was asked for. Returns whether it is taken. */
function chooseAxis(data, axis, note) {
  note.textContent = visibleText(axisNote(data, axis));
  if (!hasAxis(axis)) return false;
  page.axis = axis;
  cursor.x = null;
  redrawPlots();
  return true;
}

/** Which runs are not drawn over an axis, and why; empty where all are. */
function axisNote(data, axis) {
  const missing = axis === "step" ? [] : data.runs.filter((run) => !(run.axes[axis] || []).some(isNumber));
  const reasonOf = (run) => (axis === "flops" && run.axes.flops_note) || "It was not recorded.";
  const byReason = Map.groupBy(missing, reasonOf);
  const told = [...byReason].map(([reason, runs]) =>
    data.runs.length === 1 ? reason : `${runs.map((run) => run.label || run.name).join("; ")}: ${reason}`,
  );
  return told.length ? `Not drawn over ${AXES[axis]}. ${told.join(" ")}` : "";
}

/** The sections of figures are many: a menu holds them. */
function figureMenu(links) {
  const menu = element("div", { class: "menu", popover: "auto", id: "figure-menu" }, links);
  const button = element("button", { type: "button", class: "menu-button", popovertarget: "figure-menu" }, "Figures");
  menu.addEventListener("beforetoggle", () => {
    const place = button.getBoundingClientRect();
    menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - 260))}px`;
    menu.style.top = `${place.bottom + 4}px`;
  });
  menu.addEventListener("click", (event) => event.target.matches("a") && menu.hidePopover());
  return [button, menu];
}

function runSwitches(data) {
  const switches = [element("div", { class: "legend", role: "group", "aria-label": "Runs shown" }, legendChips())];
  const changed = () => {
    document.querySelector("#toolbar .legend").replaceChildren(...legendChips());
    document.querySelector("#toolbar .bands")?.toggleAttribute("hidden", page.grouping === "runs");
    redrawPlots();
  };
  if (data.comparison) {
    const choose = (grouping) => {
      page.grouping = grouping;
      page.hidden.clear();
      changed();
    };
    switches.unshift(
      segmented(
        "Draw",
        [
          ["groups", "Groups"],
          ["runs", "Each run"],
        ],
        page.grouping,
        choose,
      ),
    );
    const bands = selection("Band", Object.entries(BANDS), page.band, (band) => {
      page.band = band;
      changed();
    });
    bands.classList.add("bands");
    bands.toggleAttribute("hidden", page.grouping === "runs");
    switches.push(bands);
  }
  return switches;
}

function legendChips() {
  return units().map((unit, index) => {
    const isShown = !page.hidden.has(unit.key);
    const chip = element(
      "button",
      { type: "button", class: "chip", "aria-pressed": String(isShown) },
      swatch(`var(--line-${(index % NUM_LINE_COLOURS) + 1})`),
      unit.label,
      unit.runs.length > 1 ? element("span", { class: "count" }, ` ${unit.runs.length} seeds`) : null,
    );
    chip.addEventListener("click", () => {
      if (isShown) page.hidden.add(unit.key);
      else page.hidden.delete(unit.key);
      document.querySelector("#toolbar .legend").replaceChildren(...legendChips());
      document.querySelectorAll("#toolbar .chip")[index].focus();
      redrawPlots();
    });
    return chip;
  });
}
