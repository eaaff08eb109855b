"use strict";
/* Builds the page's elements. Every text enters as a text node: a response is hostile text, and never markup. */

const SVG = "http://www.w3.org/2000/svg";

/* What a reader could not see, or what would re-order the text around it: controls but tab and newline, halves of
   surrogate pairs, marks of direction, the byte order mark. */
const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cs}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/gu;

function codePointName(character) {
  return `‹U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
}

/** The text with the name of each unseen character in its place. */
function visibleText(text) {
  return String(text).replace(UNSEEN, codePointName);
}

function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(visibleText(child)));
  }
  return node;
}

/** An element: attributes by name; `on` holds listeners by event; true sets an empty attribute, false leaves it out. */
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    } else if (value === true) {
      node.setAttribute(name, "");
    } else if (value !== false && value !== null && value !== undefined) {
      node.setAttribute(name, visibleText(value));
    }
  }
  return append(node, children);
}

function svgElement(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

const ICON_PATHS = {
  good: "M3.5 8.5l3 3 6-7",
  note: "M8 1.6a6.4 6.4 0 1 1 0 12.8a6.4 6.4 0 1 1 0-12.8M8 7.4v4M8 4.6v.5",
  warning: "M8 2.2L14.6 13.6H1.4zM8 6.4v3.4M8 11.4v.5",
  bad: "M4.2 4.2l7.6 7.6M11.8 4.2l-7.6 7.6",
};

/** A small drawing beside a word; the word says the same. */
function icon(kind) {
  const svg = svgElement("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true", focusable: "false" });
  svg.append(svgElement("path", { d: ICON_PATHS[kind] }));
  return svg;
}

/** What a reader should know before reading on. */
function warning(text) {
  return element("p", { class: "warning-line" }, icon("warning"), " ", text);
}

/** A sample of a line, as a figure draws it. */
function swatch(colour, dash = "") {
  const svg = svgElement("svg", { viewBox: "0 0 22 8", class: "swatch", "aria-hidden": "true", focusable: "false" });
  const line = svgElement("line", { x1: 1, x2: 21, y1: 4, y2: 4, "stroke-dasharray": dash });
  line.style.stroke = colour;
  svg.append(line);
  return svg;
}

/** A choice of one of several, as a row of buttons. `choose` may refuse a choice by returning false. */
function segmented(label, choices, chosen, choose) {
  const buttons = choices.map(([value, text]) =>
    element("button", { type: "button", "aria-pressed": String(value === chosen) }, text),
  );
  buttons.forEach((button, index) =>
    button.addEventListener("click", () => {
      if (choose(choices[index][0]) === false) return;
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    }),
  );
  return element(
    "div",
    { class: "segmented", role: "group", "aria-label": label },
    element("span", {}, label),
    buttons,
  );
}

/** A labelled list of choices. */
function selection(label, choices, chosen, choose) {
  const list = element(
    "select",
    { "aria-label": label, on: { change: () => choose(choices[list.selectedIndex][0]) } },
    choices.map(([value, text]) => element("option", { selected: value === chosen }, text)),
  );
  return element("label", { class: "selection" }, element("span", {}, label), list);
}

/** A table; a cell is a text, an element, or [text, attributes]. */
function table(caption, head, rows, attributes = {}) {
  const cell = (tag, more) => (content) =>
    Array.isArray(content) ? element(tag, { ...more, ...content[1] }, content[0]) : element(tag, more, content);
  const body = rows.map(([first, ...rest]) =>
    element("tr", {}, cell("th", { scope: "row" })(first), rest.map(cell("td", {}))),
  );
  return element(
    "div",
    { class: "table-box", tabindex: "0", role: "region", "aria-label": caption },
    element(
      "table",
      attributes,
      element("caption", {}, caption),
      element("thead", {}, element("tr", {}, head.map(cell("th", { scope: "col" })))),
      element("tbody", {}, body),
    ),
  );
}

/** A section of the page, with an anchor for the toolbar, which calls it by its short name. */
function section(id, [title, short], text, ...content) {
  return element(
    "section",
    { id, "aria-labelledby": `${id}-title`, "data-short": short || title },
    element("h2", { id: `${id}-title` }, title),
    text ? element("p", { class: "lead" }, text) : null,
    content,
  );
}
