/* The bar that stays in view: the sections, the axis of all figures, and the runs that they show. */

function fillToolbar(data) {
  const link = (node) => element("a", { href: `#${node.id}` }, node.dataset.short);
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
