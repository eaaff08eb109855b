/* Everything about one token, in words and numbers. */

const REASONS = {
  environment: "an environment wrote it",
  truncated: "its response was cut at the longest length",
  too_stale: "weights that are too old wrote it",
  sequence_filter: "the sequence filter left its response out",
  rollout_correction: "the rollout correction left it out",
};

function quoted(text) {
  if (text === "") return "no text: a part of a character";
  const named = visibleText(text).replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return `“${named}”`;
}

function tokenFacts(view, index) {
  const { arrays } = view;
  const logProb = (name) =>
    isNumber(arrays[name][index])
      ? `${formatNumber(arrays[name][index], 4)}, p ${formatNumber(Math.exp(arrays[name][index]))}`
      : "–";
  const reason = view.leftOut[index];
  const version = arrays.policy_version[index];
  const recorded = view.objective.future_kl;
  const beside = (name) => (recorded && !view.isOwnHalfLife() ? ` (run: ${formatNumber(arrays[name][index], 4)})` : "");
  const shift = arrays.shift[index];
  return [
    ["influence weight f", formatNumber(view.influenceWeights[index], 4) + beside("influence_weight")],
    ["Future-KL F", formatNumber(view.futureKl[index], 4) + beside("future_kl")],
    ["shift s", formatNumber(shift, 4)],
    ["ratio, exp(s)", formatNumber(Math.exp(shift), 4)],
    [
      "enters F",
      !arrays.in_suffix_sum[index]
        ? "no: not the policy's"
        : arrays.participates[index]
          ? "yes"
          : "no: its ratio is extreme",
    ],
    ["token loss", formatNumber(arrays.token_loss[index], 4)],
    ["in the loss", reason ? `no: ${REASONS[reason] || reason}` : "yes"],
    ["entropy", `${formatNumber(arrays.entropy[index])} nats`],
    ["log-prob, engine", logProb("rollout_log_prob")],
    ["log-prob, old", logProb("old_log_prob")],
    ["log-prob, current", logProb("log_prob")],
    ["written by", version < 0 ? "untold weights" : `version ${version}`],
    ["segment", String(view.segments[index] ?? "–")],
  ];
}

function fillTokenRow(panel, view, index) {
  if (!view || index === null || index < 0) {
    panel.replaceChildren(
      element("p", { class: "muted" }, "Point at a token, or press one, to read everything about it."),
    );
    return;
  }
  panel.replaceChildren(
    element(
      "p",
      { class: "token-name" },
      element("span", { class: "number" }, `${index + 1} of ${view.numTokens}`),
      element("code", {}, quoted(view.texts[index])),
    ),
    element(
      "dl",
      {},
      tokenFacts(view, index).map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
    ),
  );
}
