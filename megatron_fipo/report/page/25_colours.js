/* Colours come from page.css, so that light and dark are said once. */

const NUM_LINE_COLOURS = 8;
const DASHES = [
  ["solid", ""],
  ["dash", "6 3"],
  ["dot", "2 2"],
  ["dashdot", "6 2 2 2"],
  ["longdash", "10 3"],
  ["longdashdot", "10 2 2 2"],
  ["2px,6px", "2 6"], // seven, as many as a figure has lines
];
const NUM_LEVELS = 20; // steps of the diverging scale on either side of its centre

function styleValue(variable) {
  return getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
}

function lineColour(index) {
  return styleValue(`--line-${(index % NUM_LINE_COLOURS) + 1}`);
}

/** The colour with an opacity; colours in page.css are written as #rrggbb. */
function faint(colour, opacity) {
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

const darkScheme = matchMedia("(prefers-color-scheme: dark)");

/** One rule for each level of the scale: a token's colour is a class, and follows light and dark by itself. */
function addLevelRules() {
  const rules = [];
  for (let level = 1; level <= NUM_LEVELS; level += 1) {
    const share = (100 * level) / NUM_LEVELS;
    rules.push(`.above-${level} { background-color: color-mix(in oklab, var(--above) ${share}%, transparent); }`);
    rules.push(`.below-${level} { background-color: color-mix(in oklab, var(--below) ${share}%, transparent); }`);
  }
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(rules.join("\n"));
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
}

function levelClass(level) {
  if (level === 0) return "";
  return level > 0 ? ` above-${level}` : ` below-${-level}`;
}

/** Level of a value: 0 at the centre, ± NUM_LEVELS at `reach` from it and beyond. */
function levelOf(value, centre, reach) {
  if (!isNumber(value) || reach <= 0) return 0;
  const part = Math.max(-1, Math.min(1, (value - centre) / reach));
  return Math.round(part * NUM_LEVELS);
}
