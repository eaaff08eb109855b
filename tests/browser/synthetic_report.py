"""Reports made up for the page's tests: contract JSON of one run with traces, and of two groups of three seeds."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = Path(__file__).parents[2] / "megatron_fipo" / "report" / "page"
NUM_STEPS = 40
HALF_LIFE = 32.0
OBJECTIVE: dict[str, Any] = {
    "future_kl": True,
    "half_life_tokens": HALF_LIFE,
    "influence_min": 0.8,
    "influence_max": 1.2,
    "safety_ratio": 3.0,
    "dual_clip": 10.0,
    "filter_extreme_ratios": True,
    "future_kl_reference": "proximal",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.28,
    "max_dual_clipped_tokens": 1,
}
FLOPS_NOTE = "Operations are not known: model.path=./model is no folder here with a config.json."
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "\u202eevil\u0000 <!-- "
)
SENTENCES = (
    "Let me add the first two numbers.\n",
    "So 17 plus 26 is 43, and 43 plus 9 is 52.\n",
    "Wait, let me check that again: 17 + 26 = 43.\n",
    "That is right.\n\n",
    "Now subtract 12, which leaves 40.\n",
    "\tHence the answer should be 40.\n",
    "Alternatively, take 26 − 12 first, which is 14, and then 17 + 14 + 9 = 40.\n",
)


def figures() -> list[dict[str, Any]]:
    """A figure of each kind: one line, several lines, a band, a logarithmic axis."""

    def figure(
        section: str, title: str, caption: str, lines: list[tuple[str, str, str]], **more: Any
    ) -> dict[str, Any]:
        identifier = title.lower().replace(" ", "-")
        told = [{"metric": metric, "label": label, "role": role} for metric, label, role in lines]
        return (
            {"id": identifier, "section": section, "title": title, "caption": caption, "unit": ""}
            | {"log": False, "is_share": False}
            | more
            | {"lines": told}
        )

    quantiles = [("min", "low"), ("p25", "line"), ("mean", "line"), ("p75", "line"), ("max", "high")]
    return [
        figure("learning", "Reward", "Rises while the policy learns.", [("reward/mean", "mean", "line")]),
        figure(
            "learning",
            "Response length",
            "All quantiles move together; if the largest alone grows, that is repetition.",
            [(f"rollout/response_tokens/{name}", name, role) for name, role in quantiles],
            unit="tokens",
        ),
        figure(
            "learning", "Entropy", "Falls slowly; a fall to 0 is collapse.", [("policy/entropy/mean", "mean", "line")]
        ),
        figure(
            "fipo",
            "Influence weights",
            "The mean differs a little from 1, inside the range.",
            [
                (f"fipo/influence_weight/{name}", name, role)
                for name, role in (("min", "low"), ("mean", "line"), ("max", "high"))
            ],
        ),
        figure("fipo", "Policy KL", "Small and steady.", [("policy/kl/mean", "mean of −s", "line")], log=True),
        figure(
            "evaluation",
            "Held-out score",
            "Sparse: evaluations alone.",
            [
                (f"evaluation/held_out/{name}", label, role)
                for name, label, role in (
                    ("avg@4", "avg@4", "line"),
                    ("avg@4_ci95_low", "95 % low", "low"),
                    ("avg@4_ci95_high", "95 % high", "high"),
                    ("pass@4", "pass@4", "line"),
                )
            ],
            is_share=True,
        ),
    ]


def metrics(random: np.random.Generator, pace: float, future_kl: bool) -> dict[str, list[float | None]]:
    """Curves of a run that learns; pace says how fast."""
    steps = np.arange(NUM_STEPS + 1)
    trained = steps > 0

    def noisy(values: NDArray[np.float64], size: float) -> list[float | None]:
        told = values + random.normal(0, size, len(steps))
        return [float(value) if is_trained else None for value, is_trained in zip(told, trained, strict=True)]

    rise = 1 - np.exp(-steps * pace / 12)
    length = 180 + 220 * rise
    found = {
        "reward/mean": noisy(-0.6 + 1.4 * rise, 0.05),
        "policy/entropy/mean": noisy(0.9 - 0.5 * rise, 0.02),
        "policy/kl/mean": noisy(1e-4 * (1 + 4 * rise), 1e-5),
        "evaluation/held_out/avg@4": [float(0.3 + 0.5 * rise[step]) if step % 10 == 0 else None for step in steps],
    }
    scores = found["evaluation/held_out/avg@4"]
    for name, more in {"avg@4_ci95_low": -0.04, "avg@4_ci95_high": 0.04, "pass@4": 0.19}.items():
        found[f"evaluation/held_out/{name}"] = [None if score is None else score + more for score in scores]
    for name, factor in {"min": 0.2, "p25": 0.7, "mean": 1.0, "p75": 1.3, "max": 2.6}.items():
        found[f"rollout/response_tokens/{name}"] = noisy(length * factor, 6)
    if future_kl:
        for name, centre in {"min": 0.82, "mean": 1.004, "max": 1.19}.items():
            found[f"fipo/influence_weight/{name}"] = noisy(np.full(len(steps), centre), 0.006)
    return found


def token_texts(random: np.random.Generator, num_tokens: int) -> list[str]:
    """Words with the space before them, and newlines, as a tokenizer would cut them."""
    texts: list[str] = []
    while len(texts) < num_tokens:
        sentence = SENTENCES[random.integers(len(SENTENCES))]
        for word in sentence.rstrip("\n").split(" "):
            texts.append(word if not texts or texts[-1].endswith("\n") else f" {word}")
        texts.append(sentence[len(sentence.rstrip("\n")) :])
    return texts[:num_tokens]


def encoded(values: NDArray[Any]) -> str:
    """Base64 of the little-endian numbers."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def future_kl_of(
    shift: NDArray[Any],
    participates: NDArray[Any],
    in_suffix_sum: NDArray[Any],
    advantage: float,
    half_life: float,
    objective: dict[str, Any] = OBJECTIVE,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(F, f) in float64, token by token from the right: what the page is held against."""
    decay = 2.0 ** (-1.0 / half_life)
    future_kl = np.zeros(len(shift))
    later = 0.0
    for index in reversed(range(len(shift))):
        later = (float(shift[index]) if in_suffix_sum[index] and participates[index] else 0.0) + decay * later
        future_kl[index] = later
    weights = np.clip(np.exp(future_kl), objective["influence_min"], objective["influence_max"])
    unsafe = (advantage < 0) & (np.exp(shift.astype(np.float64)) > objective["safety_ratio"])
    return future_kl, np.where(unsafe, np.clip(weights, 0.8, 1.0), weights)


def token_data(
    random: np.random.Generator,
    num_tokens: int,
    advantage: float,
    future_kl: bool = True,
    texts: list[str] | None = None,
) -> dict[str, Any]:
    """T of the contract: a few extreme ratios, a stretch that an environment wrote, two masked tokens."""
    texts = token_texts(random, num_tokens) if texts is None else texts
    drift = np.convolve(random.normal(0, 0.012, num_tokens), np.ones(12) / 12, mode="same")
    shift = (random.normal(0, 0.014, num_tokens) + drift).astype(np.float32)
    if num_tokens > 60 and advantage < 0:
        shift[17], shift[41] = 2.6, 1.4
    left_out = {index: "rollout_correction" for index in (23, 31) if index < num_tokens}
    left_out |= dict.fromkeys(range(80, min(95, num_tokens - 1)), "environment")
    in_suffix_sum = np.array([left_out.get(index) != "environment" for index in range(num_tokens)], np.uint8)
    participates = (np.exp(shift) <= OBJECTIVE["dual_clip"]).astype(np.uint8)
    sums, weights = future_kl_of(shift, participates, in_suffix_sum, advantage, HALF_LIFE)
    old = -np.abs(random.gamma(0.6, 0.5, num_tokens)).astype(np.float32)
    arrays = {
        "shift": shift,
        "participates": participates,
        "in_suffix_sum": in_suffix_sum,
        "future_kl": (sums if future_kl else np.full(num_tokens, np.nan)).astype(np.float32),
        "influence_weight": (weights if future_kl else np.ones(num_tokens)).astype(np.float32),
        "token_loss": (-weights * advantage * np.exp(shift)).astype(np.float32),
        "entropy": random.gamma(0.5, 0.6, num_tokens).astype(np.float32),
        "rollout_log_prob": (old + random.normal(0, 0.002, num_tokens)).astype(np.float32),
        "old_log_prob": old,
        "log_prob": (old + shift).astype(np.float32),
        "policy_version": np.where(in_suffix_sum == 1, 11, -1).astype(np.int32),
    }
    return {
        "texts": texts,
        "left_out": {str(index): reason for index, reason in left_out.items()},
        "segments": [int(index >= 95) for index in range(num_tokens)],
        "arrays": {name: encoded(values) for name, values in arrays.items()},
    }


class SyntheticReport:
    """The data of a page and its token scripts, written by `write`."""

    def __init__(self, data: dict[str, Any], tokens: dict[str, dict[str, Any]]) -> None:
        self.data = data
        self.tokens = tokens

    def write(self, path: Path, plotting: str, extra_head: str = "") -> Path:
        """One self-contained page, from the same parts as a real one."""
        scripts = "\n".join(file.read_text() for file in sorted(PAGE.glob("*.js")))
        told = {
            "STYLE": f"<style>{(PAGE / 'page.css').read_text()}</style>{extra_head}",
            "PLOTTING": f"<script>{plotting}</script>",
            "DATA": json_script("report-data", self.data),
            "TOKENS": "".join(json_script(name, tokens) for name, tokens in self.tokens.items()),
            "SCRIPTS": f"<script>{scripts}</script>",
        }
        page = (PAGE / "page.html").read_text()
        for name, text in told.items():
            before, mark, after = page.partition(f"<!--@{name}-->")
            assert mark, f"page.html has no mark for {name}."
            page = before + text + after
        path.write_text(page)
        return path


def json_script(identifier: str, value: object) -> str:
    """A script element of JSON that no text in it can end."""
    text = json.dumps(value).replace("<", "\\u003c")
    return f'<script type="application/json" id="{identifier}">{text}</script>'


def response(
    index: int, advantage: float, num_tokens: int, tokens: dict[str, Any] | None, name: str | None, **more: Any
) -> dict[str, Any]:
    """R of the contract: the head of a response, with its tokens under their name, or without any."""
    weights = np.frombuffer(base64.b64decode(tokens["arrays"]["influence_weight"]), "<f4") if tokens else np.empty(0)
    left_out = [int(place) for place in tokens["left_out"]] if tokens else list(range(num_tokens))
    in_loss = np.delete(weights, left_out) if tokens else weights
    is_right = advantage > 0
    return {
        "sample_index": index,
        "is_right": is_right,
        "score": float(is_right),
        "reward": 1.0 if is_right else -1.0,
        "advantage": advantage,
        "answer": "40" if is_right else "42",
        "finish_reason": "stop",
        "left_out": "",
        "num_tokens": num_tokens,
        "num_left_out": len(left_out),
        "mean_weight_deviation": float(np.abs(in_loss.astype(float) - 1).mean()) if len(in_loss) else None,
        "tokens": name,
    } | more


def run(index: int, algorithm: str, seed: int, pace: float) -> dict[str, Any]:
    """A run without traces."""
    random = np.random.default_rng(100 * index + seed)
    is_fipo = algorithm == "fipo"
    steps = list(range(NUM_STEPS + 1))
    tokens = np.cumsum([0, *(random.integers(40_000, 60_000, NUM_STEPS))])
    sample = {"source": "held_out", "prompt": "What is 17 + 26 + 9 − 12?", "reference": "40", "num_tokens": 31}
    second = sample | {"prompt": HOSTILE}
    curves = metrics(random, pace, is_fipo)
    scores = curves["evaluation/held_out/avg@4"]
    return {
        "id": f"r{index}",
        "name": f"{algorithm}_{seed}",
        "label": f"{algorithm}, seed {seed}",
        "algorithm": algorithm,
        "seed": seed,
        "state": "finished",
        "num_steps": NUM_STEPS,
        "verdict": verdict(is_fipo),
        "steps": steps,
        "metrics": curves,
        "axes": {"tokens": [int(value) for value in tokens], "flops": None, "flops_note": FLOPS_NOTE},
        "evaluations": [
            {"step": step, "source": "held_out", "k": 4, "avg": score, "low": score - 0.04, "high": score + 0.04}
            | {"cons": score + 0.06, "pass": min(1.0, score + 0.2), "response_tokens": 180 + 5 * step}
            for step, score in zip(steps, scores, strict=True)
            if score is not None
        ],
        "time": {
            "phases": ["rollout", "old_log_probs", "update", "weight_sync", "other"],
            "seconds": [[None, *random.gamma(40, size / 40, NUM_STEPS).tolist()] for size in (41, 3, 12, 2, 0.6)],
        },
        "samples": {
            "before": [
                one | {"response": "I think it is 42.", "answer": "42", "is_right": False, "step": 0}
                for one in (sample, second)
            ],
            "after": [
                one
                | {
                    "response": f"17 + 26 = 43.\n43 + 9 = 52.\n52 − 12 = 40.\n{HOSTILE}",
                    "answer": "40",
                    "is_right": True,
                    "step": NUM_STEPS,
                }
                for one in (sample, second)
            ],
        },
        "analysis": analysis(random),
        "objective": OBJECTIVE | {"future_kl": is_fipo},
        "groups": [],
        "traces": {"num_responses": 0, "num_left_out": 0},
        "config": {
            "run.seed": seed,
            "algorithm": algorithm,
            "objective.half_life_tokens": HALF_LIFE,
            "run.name": HOSTILE,
        },
    }


def analysis(random: np.random.Generator) -> dict[str, Any]:
    """Trends of two names over training, at two places, and a name of which there is nothing."""
    names = {
        "recheck/per_response": {
            "title": "Re-checks per response",
            "caption": "How often a response looks again at what it has.",
        },
        "repetition/compressible_share": {
            "title": "Compressible share",
            "caption": "What a compressor takes away; repetition raises it.",
        },
    }
    points = [
        {"step": step, "source": "held_out", "where": where, "num_responses": 128}
        | {"values": {name: float(0.3 + 0.01 * step + random.normal(0, 0.02)) for name in names}}
        for step in range(0, NUM_STEPS + 1, 10)
        for where in ("evaluation", "training")
    ]
    for point in points:
        point["values"] |= {"length/code_tokens": 0.0 if point["where"] == "training" else None}
    names["length/code_tokens"] = {"title": "Tokens of code", "caption": "Tokens of blocks of code."}
    return {"points": points, "names": names}


def verdict(is_fipo: bool) -> list[dict[str, Any]]:
    """A finding of each level."""
    findings: list[tuple[str, str, str, list[str]]]
    good = "Reward rose from −0.41 in the first third of the steps to 0.72 in the last: 95 % interval [1.05, 1.21]."
    findings = [("good", "It is learning", good, ["reward/mean"])]
    if is_fipo:
        acting = "Weights have a standard deviation of 0.06 after each step's first update."
        findings.append(
            (
                "good",
                "FIPO is acting",
                acting,
                ["fipo/influence_weight/std_after_first_update", "fipo/influence_weight/mean"],
            )
        )
    findings.append(
        ("note", "Responses grow", "The mean length went from 182 to 396 tokens.", ["rollout/response_tokens/mean"])
    )
    findings.append(("warning", "Entropy is falling", "It fell from 0.88 to 0.41 nats.", ["policy/entropy/mean"]))
    if not is_fipo:
        findings.append(
            (
                "bad",
                "Many responses are cut",
                "9.1 % of the last step's responses were cut at the limit.",
                ["rollout/truncated_share"],
            )
        )
    return [dict(zip(("level", "title", "text", "metrics"), finding, strict=True)) for finding in findings]


def report(runs: list[dict[str, Any]], comparison: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The whole of the contract's object."""
    sections = [
        {"id": "evaluation", "title": "Evaluation", "text": "Scores on problems that are not trained on."},
        {"id": "learning", "title": "Learning", "text": "What the paper plots of rewards, responses and the policy."},
        {"id": "fipo", "title": "FIPO at work", "text": "Influence weights, and how far the policy moves in a step."},
    ]
    return {
        "format": 1,
        "title": "quickstart",
        "written_at": "2026-11-27 08:01",
        "version": "0.1.0",
        "is_live": False,
        "sections": sections,
        "figures": figures(),
        "runs": runs,
        "comparison": comparison,
    } | more


def one_run(lengths: Iterable[int] = (260, 140, 700, 22, 330, 210, 90, 480), long_tokens: int = 0) -> SyntheticReport:
    """One run with three traced groups: in the second one hostile tokens, in the third a response of long_tokens."""
    random = np.random.default_rng(7)
    told = run(0, "fipo", 0, 1.0)
    tokens: dict[str, dict[str, Any]] = {}
    lengths = list(lengths)
    for number, (step, prompt_id) in enumerate([(20, 12), (40, 67), (40, 81)]):
        responses = []
        for index, length in enumerate(lengths):
            advantage = 0.9 if (index + number) % 3 else -0.75
            name = f"t{len(tokens)}"
            texts = None
            if number == 1 and index == 0:
                texts = [HOSTILE, "", "\n", "\ud800", *token_texts(random, length - 4)]
            if number == 2 and index == 0 and long_tokens:
                length = long_tokens
            tokens[name] = token_data(random, length, advantage, texts=texts)
            responses.append(response(index, advantage, length, tokens[name], name))
        more = {"left_out": "truncated", "finish_reason": "length"}
        responses.append(response(len(lengths), -0.75, 128, None, None, **more))
        group = {"step": step, "update": 3, "num_updates": 8, "source": "chains", "prompt_id": prompt_id}
        prompt = "What is 17 + 26 + 9 − 12? Think step by step, and end with the answer alone on a line."
        told["groups"].append(group | {"prompt": prompt, "reference": "40", "responses": responses})
    told["traces"] = {"num_responses": 3 * (len(lengths) + 1) + 40, "num_left_out": 40}
    return SyntheticReport(report([told]), tokens)


def six_runs() -> SyntheticReport:
    """FIPO beside DAPO, three seeds each."""
    runs = [
        run(index, algorithm, index % 3, pace)
        for index, (algorithm, pace) in enumerate([("fipo", 1.3)] * 3 + [("dapo", 0.9)] * 3)
    ]
    groups = [{"label": "fipo", "runs": [0, 1, 2]}, {"label": "dapo", "runs": [3, 4, 5]}]
    scores = [
        {
            "metric": "evaluation/held_out/avg@4",
            "groups": [
                {"label": "fipo", "mean": 0.79, "low": 0.77, "high": 0.81, "values": [0.79, 0.78, 0.8]},
                {"label": "dapo", "mean": 0.77, "low": 0.74, "high": 0.8, "values": [0.77, 0.76, 0.78]},
            ],
            "differences": [
                {
                    "a": "fipo",
                    "b": "dapo",
                    "mean": 0.02,
                    "low": 0.004,
                    "high": 0.036,
                    "paired_by": "problem",
                    "num_pairs": 128,
                },
                {
                    "a": "fipo",
                    "b": "dapo",
                    "mean": 0.02,
                    "low": -0.03,
                    "high": 0.07,
                    "paired_by": "seed",
                    "num_pairs": 3,
                },
            ],
        }
    ]
    differences = [
        {"key": "algorithm", "values": ["fipo"] * 3 + ["dapo"] * 3},
        {"key": "objective.dual_clip", "values": [10.0] * 3 + [None] * 3},
    ]
    comparison = {"groups": groups, "scores": scores, "config_differences": differences, "note": ""}
    return SyntheticReport(report(runs, comparison, title="FIPO beside DAPO"), {})
