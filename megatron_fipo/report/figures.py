"""The table of figures: every figure of the paper, and what else tells how a run goes."""

from __future__ import annotations

from megatron_fipo.report.figure import HIGH, LOW, Figure, Line, Section, line_in_band, lines_of

SECTIONS = (
    Section("evaluation", "Evaluation", "Scores on problems that are not trained on."),
    Section("learning", "Learning", "Rewards in training."),
    Section("length", "Length of responses", "How long responses are, and what their length has to do with accuracy."),
    Section("updates", "The policy's updates", "How far each step moves the policy, and how much the clips hold back."),
    Section(
        "fipo",
        "Influence weights",
        "What Future-KL makes of each token: the weight f of its advantage, and exp(F) from which it comes.",
    ),
    Section("ratios", "Ratios of old and new policy", "Where the policy moves most; tails grow before a run breaks."),
    Section("shadow", "Shadow settings", "What other settings of FIPO would have done on the same updates."),
    Section(
        "engine", "Engine, precision and staleness", "What lies between the policy that wrote and the one trained."
    ),
    Section("batch", "Batches", "What dynamic sampling keeps and drops."),
    Section("speed", "Speed", "Time and throughput of a step."),
)

FIGURES = (
    # --- evaluation
    Figure(
        "scores",
        "evaluation",
        "Held-out scores: <source>",
        "avg is the share of right responses with its 95 % interval over problems, cons the share of problems whose "
        "most frequent answer is right, pass the share with a right response at all. A change within the "
        "intervals shows nothing.",
        (
            Line("evaluation/<source>/avg@<k>", "avg@<k>"),
            Line("evaluation/<source>/avg@<k>_ci95_low", "95 % low", LOW),
            Line("evaluation/<source>/avg@<k>_ci95_high", "95 % high", HIGH),
            Line("evaluation/<source>/cons@<k>", "cons@<k>"),
            Line("evaluation/<source>/pass@<k>", "pass@<k>"),
        ),
        is_share=True,
    ),
    # --- learning
    Figure(
        "reward",
        "learning",
        "Reward",
        "Mean reward of everything that was generated, overlong penalty included. It rises.",
        (Line("reward/mean", "mean"),),
    ),
    Figure(
        "accuracy",
        "learning",
        "Accuracy in training",
        "Share of responses that the verifier accepts. It rises; near 0 or 1 few groups carry a signal.",
        (Line("rollout/accuracy/mean", "accuracy"),),
        is_share=True,
    ),
    Figure(
        "verifiers",
        "learning",
        "Scores of each verifier",
        "Mean score of each of a source's verifiers. Each rises where its weight is above 0.",
        (Line("reward/verifier/<name>/mean", "<name>"),),
    ),
    # --- length
    Figure(
        "response-length",
        "length",
        "Response length",
        "Mean, median and the shortest. All of them move together; the mean grows slowly, or stays.",
        (
            *line_in_band("rollout/response_tokens", "mean", "p25", "p75"),
            *lines_of("rollout/response_tokens", "median", "min"),
        ),
        unit="tokens",
    ),
    Figure(
        "longest-response",
        "length",
        "Longest response",
        "If only the longest grow, that is repetition.",
        lines_of("rollout/response_tokens", "max", "p75"),
        unit="tokens",
    ),
    Figure(
        "truncated",
        "length",
        "Truncated responses",
        "Share of responses that were cut at the limit. A few per cent; a rise means repetition, or too small a limit.",
        (Line("rollout/truncated_share", "training"), Line("evaluation/<source>/truncated/share", "<source>")),
        is_share=True,
    ),
    Figure(
        "accuracy-by-length",
        "length",
        "Accuracy against length",
        "Accuracy of responses of more than so many and at most so many tokens. It falls only mildly with length.",
        (Line("rollout/accuracy_by_length/<low>_to_<high>", "<low> to <high>"),),
        is_share=True,
    ),
    Figure(
        "length-advantage",
        "length",
        "Length-weighted advantage",
        "Σ A·length / Σ length over the batch. Near 0; below 0 lengths are pushed down, above 0 up.",
        (Line("advantages/length_weighted_mean", "mean"),),
    ),
    # --- updates
    Figure(
        "policy-kl",
        "updates",
        "Policy KL",
        "Mean of −shift, an estimate of KL(π_old, π). Small and steady; fast growth means too large a learning rate.",
        (Line("policy/kl/mean", "KL"),),
        unit="nats",
    ),
    Figure(
        "entropy",
        "updates",
        "Entropy",
        "Mean entropy of the next token. It falls slowly; a fall to 0 is collapse, a rise without end is noise.",
        (Line("policy/entropy/mean", "entropy"),),
        unit="nats",
    ),
    Figure(
        "gradient-norm",
        "updates",
        "Gradient norm",
        "Before clipping: mean and largest of the step's updates. Few spikes.",
        (Line("optim/grad_norm", "mean"), Line("optim/grad_norm/max", "largest")),
    ),
    Figure(
        "clipped",
        "updates",
        "Clipped tokens",
        "Share of tokens whose loss is clipped: a few per cent at most. Above that, updates are too large.",
        (Line("policy/clip_fraction", "clipped"),),
        is_share=True,
    ),
    Figure(
        "dual-clipped",
        "updates",
        "Dual-clipped tokens",
        "Share of tokens with a negative weighted advantage and a ratio above objective.dual_clip. 0, or rare.",
        (Line("policy/dual_clip_fraction", "dual-clipped"),),
        is_share=True,
    ),
    Figure(
        "shift",
        "updates",
        "Log-prob shift",
        "Standard deviation of log π − log π_old over tokens. It grows with learning rate and updates; 0 means that "
        "nothing is learnt.",
        lines_of("policy/log_prob_shift", "std"),
        unit="nats",
    ),
    Figure(
        "reference-kl",
        "updates",
        "KL to the starting policy",
        "With a KL penalty only. It grows slowly.",
        (Line("policy/reference_kl/mean", "KL"),),
        unit="nats",
    ),
    Figure(
        "learning-rate",
        "updates",
        "Learning rate",
        "Of the step's last update.",
        (Line("optim/learning_rate", "learning rate"),),
    ),
    # --- fipo
    Figure(
        "influence-weight",
        "fipo",
        "Influence weight",
        "Mean weight f, after all clipping. It differs a little from 1.",
        line_in_band("fipo/influence_weight", "mean", "min", "max"),
    ),
    Figure(
        "influence-spread",
        "fipo",
        "Spread of the influence weights",
        "Standard deviation over all updates, and without the first one, in which every weight is 1. At 0 this is "
        "DAPO.",
        lines_of("fipo/influence_weight", ("std_after_first_update", "after the first update"), ("std", "all updates")),
    ),
    Figure(
        "influence-clipped",
        "fipo",
        "Clipped influence weights",
        "Share of tokens with exp(F) outside the range, and of weights at its upper and lower end. A minority; near "
        "1 the weights have only two values. With a range that begins at 1, every weight of 1 counts as low.",
        lines_of(
            "fipo/influence_weight",
            ("clipped_share", "outside the range"),
            ("clipped_high_share", "at the upper end"),
            ("clipped_low_share", "at the lower end"),
        ),
        is_share=True,
    ),
    Figure(
        "exp-future-kl",
        "fipo",
        "exp(F) before the clip",
        "Mean of exp(F). Around 1.",
        line_in_band("fipo/exp_future_kl", "mean", "min", "max"),
        log=True,
    ),
    Figure(
        "future-kl",
        "fipo",
        "Future-KL against its noise",
        "Standard deviation of F, and in the step's first update, where every F is rounding. The first is well "
        "above the second.",
        (Line("fipo/future_kl/std", "F"), Line("noise_floor/future_kl/std", "first update: noise")),
    ),
    Figure(
        "filtered",
        "fipo",
        "Filtered responses",
        "Responses that the sequence filter left out, counted in every update. 0, or rare.",
        (Line("fipo/filtered_sequences", "responses"),),
    ),
    # --- ratios
    Figure(
        "negative-shares",
        "ratios",
        "Negative samples: shares of large ratios",
        "Share of all response tokens that have a negative advantage and a ratio in the range. Small and steady.",
        lines_of(
            "policy/ratio_negative",
            ("share_2_to_3", "2 to 3"),
            ("share_3_to_4", "3 to 4"),
            ("share_4_to_dual_clip", "4 to dual clip"),
        ),
        is_share=True,
    ),
    Figure(
        "negative-ratios",
        "ratios",
        "Negative samples: quantiles of the ratio",
        "Ratios of tokens in responses of negative advantage. p99.9 is a few; growth from step to step is an early "
        "sign of instability.",
        lines_of("policy/ratio_negative", "p75", "p99.5", "p99.9", "max"),
        log=True,
    ),
    Figure(
        "positive-ratios",
        "ratios",
        "Positive samples: quantiles of the ratio",
        "Ratios of tokens in responses of positive advantage. Close to 1, a little above.",
        lines_of("policy/ratio_positive", "median", "min", "p25", "p75", "p99.5", "p99.9", "max"),
        log=True,
    ),
    Figure(
        "positive-share",
        "ratios",
        "Positive samples: share below 0.001",
        "Share of tokens in responses of positive advantage whose ratio is below 0.001. 0.",
        lines_of("policy/ratio_positive", ("share_below_1e-3", "below 0.001")),
        is_share=True,
    ),
    # --- shadow
    *(
        Figure(id_, "shadow", title, caption, (Line(metric, "<name>"),), is_share=metric.endswith("clipped_share"))
        for id_, title, caption, metric in (
            (
                "shadow-spread",
                "Spread of the weights",
                "Standard deviation of the weights that each setting would have given.",
                "shadow/<name>/influence_weight/std",
            ),
            (
                "shadow-clipped",
                "Clipped weights",
                "Share of tokens whose exp(F) would have lain outside the range. Near 1 the setting saturates.",
                "shadow/<name>/influence_weight/clipped_share",
            ),
            (
                "shadow-mean",
                "Mean weight",
                "Mean of the weights that each setting would have given.",
                "shadow/<name>/influence_weight/mean",
            ),
            (
                "shadow-correlation",
                "Correlation with the weights in use",
                "Near 1 the setting would have weighted the same tokens.",
                "shadow/<name>/influence_weight/correlation",
            ),
            (
                "shadow-future-kl",
                "Spread of Future-KL",
                "Standard deviation of F under each setting.",
                "shadow/<name>/future_kl/std",
            ),
            (
                "shadow-noise",
                "Share of noise",
                "Standard deviation of F in the first update, where it is rounding, over that of the later ones. "
                "Above 0.5 the weights would follow rounding.",
                "shadow/<name>/noise_floor/share_of_later_std",
            ),
        )
    ),
    # --- engine
    Figure(
        "noise-share",
        "engine",
        "Noise floor",
        "Standard deviation in the step's first update, where every shift is rounding, over that of the later updates. "
        "Near 0; above 0.5 weights follow rounding.",
        (
            Line("noise_floor/future_kl/share_of_later_std", "Future-KL"),
            Line("noise_floor/log_prob_shift/share_of_later_std", "shift"),
        ),
    ),
    Figure(
        "mismatch-kl",
        "engine",
        "KL between engine and actor",
        "KL(μ, π_old) by the k3 estimate. Small and steady; an upward trend comes before collapse.",
        (Line("mismatch/kl/mean", "KL"),),
        unit="nats",
        log=True,
    ),
    Figure(
        "mismatch-difference",
        "engine",
        "Difference of log-probs",
        "Mean |log π_old − log μ|: of all tokens, of those that the step's own weights wrote (the engine's rounding "
        "alone) and of those that older weights wrote (rounding, and staleness).",
        (
            Line("mismatch/log_prob_difference/absmean", "all"),
            Line("mismatch/newest_version/log_prob_difference/absmean", "newest weights"),
            Line("mismatch/older_versions/log_prob_difference/absmean", "older weights"),
        ),
        unit="nats",
        log=True,
    ),
    Figure(
        "mismatch-outside",
        "engine",
        "Tokens far from the engine's probability",
        "Share of tokens with π_old/μ outside the range. The widest range is near 0.",
        (Line("mismatch/share_outside_<low>_to_<high>", "<low> to <high>"),),
        is_share=True,
    ),
    Figure(
        "correction",
        "engine",
        "Rollout correction",
        "Share of tokens whose weight was cut, or that were left out. Small.",
        (
            Line("mismatch/truncated_share", "cut"),
            Line("mismatch/masked_share", "tokens left out"),
            Line("mismatch/masked_sequences_share", "responses left out"),
        ),
        is_share=True,
    ),
    Figure(
        "staleness",
        "engine",
        "Staleness",
        "Versions between the weights that wrote a token and those that the step starts with.",
        lines_of("rollout/staleness_steps", "mean", ("max", "largest")),
        unit="versions",
    ),
    Figure(
        "canary",
        "engine",
        "Servers' log-probs against the actor's",
        "On fixed sequences, for the worst server. Below the tolerance, or the run stops.",
        lines_of("canary/log_prob_difference", "mean", ("max", "largest")),
        unit="nats",
        log=True,
    ),
    # --- batch
    Figure(
        "rounds",
        "batch",
        "Rounds of generation",
        "Rounds that the batch took: 1 to 3.",
        (Line("rollout/generation_rounds", "rounds"),),
    ),
    Figure(
        "dropped",
        "batch",
        "Groups without a signal",
        "Share of generated groups whose responses are all right, all wrong, or could not be judged. Near 1 the "
        "data are too easy, or too hard.",
        lines_of(
            "rollout/dropped_groups",
            ("all_right_share", "all right"),
            ("all_wrong_share", "all wrong"),
            ("failed_share", "not judged"),
        ),
        is_share=True,
    ),
    Figure(
        "groups",
        "batch",
        "Groups",
        "Generated, and trained on.",
        (Line("rollout/generated_groups", "generated"), Line("rollout/batch_groups", "trained on")),
    ),
    # --- speed
    Figure(
        "throughput",
        "speed",
        "Throughput",
        "Prompt and response tokens trained on, by the time of the whole step.",
        (Line("perf/tokens_per_s", "tokens per second"),),
        unit="tokens/s",
    ),
    Figure(
        "rollout-tail",
        "speed",
        "The slowest responses",
        "Seconds of the slowest response, and between 90 % of the responses and the last. The latter is a small "
        "part of the rollout.",
        (Line("time_s/rollout_slowest_sample", "slowest"), Line("time_s/rollout_tail", "last tenth")),
        unit="s",
    ),
    Figure(
        "idle",
        "speed",
        "Idle slots of the engine",
        "Share of the engine's slots that were empty. Small; long tails raise it.",
        (Line("rollout/idle_slots/share", "idle"),),
        is_share=True,
    ),
    Figure(
        "weight-sync",
        "speed",
        "Weights to the servers",
        "Rate to the slowest server.",
        (Line("weight_sync/gigabytes_per_s", "GB/s"),),
        unit="GB/s",
    ),
)
