/* What the credit view shows of an open response: its values per token, and the scales that colour them. */

const REACH_QUANTILE = 0.995;

const QUANTITIES = {
  influence_weight: { title: "influence weight f", symbol: "f", centre: 1, values: (view) => view.influenceWeights },
  future_kl: { title: "Future-KL F", symbol: "F", centre: 0, values: (view) => view.futureKl },
  shift: { title: "log-prob shift s", symbol: "s", centre: 0, values: (view) => view.arrays.shift },
  token_loss: { title: "token loss", symbol: "loss", centre: 0, values: (view) => view.arrays.token_loss },
  entropy: {
    title: "entropy, nats",
    symbol: "entropy",
    centre: 0,
    isPositive: true,
    values: (view) => view.arrays.entropy,
  },
};

/** An open response with everything per token. Its F and f are recomputed by `setHalfLife`.
    `isStretched`: the colours of f are full at the response's own largest, too. */
class CreditView {
  constructor(run, group, response, tokens, isStretched) {
    Object.assign(this, {
      run,
      group,
      response,
      texts: tokens.texts,
      arrays: tokens.arrays,
      segments: tokens.segments,
    });
    this.leftOut = tokens.left_out;
    this.objective = run.objective;
    this.numTokens = tokens.texts.length;
    this.summed = summedShift(this.arrays, this.objective);
    this.setHalfLife(ownHalfLife(this.objective));
    this.isStretched = isStretched;
    this.reaches = Object.fromEntries(Object.keys(QUANTITIES).map((name) => [name, this.reachOf(name)]));
  }

  setHalfLife(halfLife) {
    this.halfLife = halfLife;
    const { shift, participates, in_suffix_sum: inSuffixSum } = this.arrays;
    const { advantage } = this.response;
    Object.assign(this, recompute(shift, participates, inSuffixSum, advantage, halfLife, this.objective, this.summed));
  }

  /** Distance from the centre at which the colour is full: for f the objective's range, else nearly the largest of the
      response's own. The same for every half-life, so that colours compare. */
  reachOf(name) {
    const { centre, values } = QUANTITIES[name];
    if (name === "influence_weight" && !this.isStretched) {
      const ends = [this.objective.influence_min, this.objective.influence_max].filter(isNumber);
      const widest = Math.max(0, ...ends.map((end) => Math.abs(end - 1)));
      if (ends.length === 2 && widest > 0) return widest;
    }
    const sizes = Float64Array.from(values(this), (value) => (isNumber(value) ? Math.abs(value - centre) : 0)).sort();
    const reach = sizes[Math.floor(REACH_QUANTILE * (sizes.length - 1))];
    return reach > 0 ? reach : sizes.at(-1) || 0;
  }

  values(name) {
    return QUANTITIES[name].values(this);
  }

  levels(name) {
    const values = this.values(name);
    const levels = new Int8Array(this.numTokens);
    for (let index = 0; index < levels.length; index += 1)
      levels[index] = levelOf(values[index], QUANTITIES[name].centre, this.reaches[name]);
    return levels;
  }

  isOwnHalfLife() {
    return this.halfLife === ownHalfLife(this.objective);
  }

  /** Mean, deviation and share at the clip of f under the half-life in use, over the tokens of the sum. */
  summary() {
    const { influence_min: low, influence_max: high } = this.objective;
    const counted = Array.from(this.influenceWeights).filter((_, index) => this.arrays.in_suffix_sum[index]);
    const outside = Array.from(this.futureKl).filter((futureKl, index) => {
      const unclipped = Math.exp(futureKl);
      return this.arrays.in_suffix_sum[index] && (unclipped < (low ?? -Infinity) || unclipped > (high ?? Infinity));
    });
    return {
      mean: mean(counted),
      deviation: deviation(counted),
      clipped: counted.length ? outside.length / counted.length : null,
    };
  }

  /** Largest difference between the page's F and the one that the run recorded, under the run's own half-life. */
  errorAgainstRun() {
    const { shift, participates, in_suffix_sum: inSuffixSum, future_kl: recorded } = this.arrays;
    const own = recompute(
      shift,
      participates,
      inSuffixSum,
      this.response.advantage,
      ownHalfLife(this.objective),
      this.objective,
      this.summed,
    );
    return own.futureKl.reduce((largest, value, index) => Math.max(largest, Math.abs(value - recorded[index]) || 0), 0);
  }
}
