/* Future-KL and influence weights, by the same recurrence as the trainer's objective, in doubles.

   x_t = shift_t where the token is in the sum and participates, else 0
   F_t = x_t + 2^(-1/half-life) F_{t+1}, from the last token on
   f_t = exp(F_t) within [influence_min, influence_max]; where the advantage is negative and the ratio above
         safety_ratio, then within [0.8, 1.0] */

const SAFETY_RANGE = [0.8, 1.0];

function within(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

/** {futureKl, influenceWeights}, both Float64Array. `summed` is the shift that is added up where it is not `shift`.

    A bound of the objective that is null, as infinity is in JSON, does not bind. */
function recompute(shift, participates, inSuffixSum, advantage, halfLife, objective, summed = shift) {
  const decay = 2 ** (-1 / halfLife);
  const low = objective.influence_min ?? -Infinity;
  const high = objective.influence_max ?? Infinity;
  const safetyRatio = objective.safety_ratio ?? Infinity;
  const futureKl = new Float64Array(shift.length);
  const influenceWeights = new Float64Array(shift.length);
  let later = 0;
  for (let index = shift.length - 1; index >= 0; index -= 1) {
    later = (inSuffixSum[index] && participates[index] ? summed[index] : 0) + decay * later;
    futureKl[index] = later;
    const weight = within(Math.exp(later), low, high);
    const isUnsafe = advantage < 0 && Math.exp(shift[index]) > safetyRatio;
    influenceWeights[index] = isUnsafe ? within(weight, ...SAFETY_RANGE) : weight;
  }
  return { futureKl, influenceWeights };
}

/* Arrays of a response's tokens travel as base64 of little-endian numbers; every platform of a browser is. */

const ARRAY_KINDS = { participates: Uint8Array, in_suffix_sum: Uint8Array, policy_version: Int32Array };

function decodeArray(name, text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let index = 0; index < binary.length; index += 1) bytes[index] = binary.charCodeAt(index);
  return new (ARRAY_KINDS[name] || Float32Array)(bytes.buffer);
}

const MAX_LOG_PROB_SHIFT = 20;

/** The shift that Future-KL adds up: not the ratio's only in the ablation future_kl_reference=behaviour. */
function summedShift(arrays, objective) {
  if (objective.future_kl_reference !== "behaviour") return arrays.shift;
  return Float64Array.from(arrays.log_prob, (value, index) =>
    within(value - arrays.rollout_log_prob[index], -MAX_LOG_PROB_SHIFT, MAX_LOG_PROB_SHIFT),
  );
}

const decoded = new Map();

/** The tokens of a response, parsed when it is first opened; an error in words where the page does not hold them. */
function tokensOf(response) {
  if (response.tokens === null) return null;
  if (!decoded.has(response.tokens)) {
    const holder = document.getElementById(response.tokens);
    if (!holder) return null;
    const parsed = JSON.parse(holder.textContent);
    const arrays = Object.fromEntries(
      Object.entries(parsed.arrays).map(([name, text]) => [name, decodeArray(name, text)]),
    );
    decoded.set(response.tokens, { ...parsed, arrays });
  }
  return decoded.get(response.tokens);
}

/** How far a response's weights are from 1 on average over the tokens of the loss, under the run's own half-life: what
    the run had, or where it trained without Future-KL what FIPO's would have been. */
function reweighting(response, objective) {
  if (objective.future_kl) return response.mean_weight_deviation;
  const tokens = tokensOf(response);
  if (!tokens) return null;
  const { shift, participates, in_suffix_sum: inSuffixSum } = tokens.arrays;
  const { influenceWeights } = recompute(
    shift,
    participates,
    inSuffixSum,
    response.advantage,
    ownHalfLife(objective),
    objective,
    summedShift(tokens.arrays, objective),
  );
  const inLoss = Array.from(influenceWeights).filter((_, index) => !(index in tokens.left_out));
  return mean(inLoss.map((weight) => Math.abs(weight - 1)));
}

const DEFAULT_HALF_LIFE = 32;

function ownHalfLife(objective) {
  return objective.half_life_tokens ?? DEFAULT_HALF_LIFE;
}
