/* Numbers as a reader wants them. */

const SUFFIXES = [
  [1e18, "E"],
  [1e15, "P"],
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

/** A number to three or four significant digits; an en dash where there is none. */
function formatNumber(value, digits = 3) {
  if (!isNumber(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5) {
    const [unit, suffix] = SUFFIXES.find(([least]) => size >= least);
    return `${Number((value / unit).toPrecision(digits))}${suffix}`;
  }
  if (size < 1e-4)
    return Number(value.toPrecision(digits))
      .toExponential()
      .replace("-", "−")
      .replace("e-", "e−");
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  const text = size >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}

function formatSigned(value) {
  return isNumber(value) && value > 0 ? `+${formatNumber(value)}` : formatNumber(value);
}

function formatShare(value) {
  return isNumber(value) ? `${formatNumber(100 * value)} %` : "–";
}

function formatSeconds(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 120) return `${formatNumber(seconds)} s`;
  if (seconds < 7200) return `${formatNumber(seconds / 60)} min`;
  return `${formatNumber(seconds / 3600)} h`;
}

function counted(number, singular, plural = `${singular}s`) {
  return `${number} ${number === 1 ? singular : plural}`;
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

/* Not Math.min(...values): thousands of steps would be too many arguments. */

function smallest(values) {
  return values.reduce((least, value) => Math.min(least, value), Infinity);
}

function largest(values) {
  return values.reduce((most, value) => Math.max(most, value), -Infinity);
}

/** Sample standard deviation; null for fewer than two values. */
function deviation(values) {
  if (values.length < 2) return null;
  const centre = mean(values);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - centre) ** 2, 0) / (values.length - 1));
}

/* 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom. */
const STUDENT = [
  12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11,
  2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/** [low, high] of a 95 % interval of the mean, or null for fewer than two values. */
function studentInterval(values) {
  if (values.length < 2) return null;
  const half = ((STUDENT[values.length - 2] ?? 1.96) * deviation(values)) / Math.sqrt(values.length);
  return [mean(values) - half, mean(values) + half];
}
