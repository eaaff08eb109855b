/* The bar that stays in view: the sections, the axis of all figures, and the runs that they show. */

function fillToolbar(data) {
  const links = [...document.querySelectorAll("main > section")].map((node) =>
    element("a", { href: `#${node.id}` }, node.dataset.short),
  );
  const axes = Object.entries({ step: "Steps", tokens: "Tokens", flops: "FLOPs" }).map(([axis, text]) => [
    axis,
    text,
    hasAxis(axis) ? "" : "No run recorded it.",
  ]);
  const toolbar = document.getElementById("toolbar");
  toolbar.classList.toggle("two-rows", data.runs.length > 1);
  toolbar.replaceChildren(
    element("div", { class: "links" }, links),
    element(
      "div",
      { class: "switches" },
      segmented("Over", axes, page.axis, (axis) => {
        page.axis = axis;
        cursor.x = null;
        redrawPlots();
      }),
      data.runs.length > 1 ? runSwitches(data) : null,
    ),
  );
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
    switches.unshift(segmented("Draw", [["groups", "Groups"], ["runs", "Each run"]], page.grouping, choose));
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
