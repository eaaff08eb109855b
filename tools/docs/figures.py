"""Draws the figures of docs/fipo.md, computed by the package itself; needs matplotlib.

python tools/docs/figures.py                            # writes docs/figures/*.svg
python tools/docs/figures.py --output DIR --format png  # to look at
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.parallel import cp_layout
from megatron_fipo.parallel.cp_suffix_sum import carries_into_chunks
from megatron_fipo.rl.future_kl import decay_to_end, future_kl, segment_heads, segment_suffix_sum
from megatron_fipo.rl.objective import clipped_token_loss, influence_weights, participates

TARGET = Path(__file__).resolve().parents[2] / "docs" / "figures"
OBJECTIVE = FipoConfig(half_life_tokens=32.0, influence_min=0.8, influence_max=1.2, safety_ratio=3.0)
"""Settings of the paper's 7B recipe: their range shows both ends of the weights."""

NUM_TOKENS = 256
RAISED, LOWERED = range(104, 116), range(196, 206)
"""Tokens whose probability the updates so far have raised and lowered."""
EXTREME = 160
"""A token with a ratio above dual_clip, which Future-KL leaves out."""
CP_SIZE = 2
"""Context-parallel ranks of the second figure."""

BLUE, RED, GREY, GREEN = "#1f5fa8", "#b5342b", "#777777", "#2d7f3d"


@dataclass(frozen=True)
class Response:
    """One response with what FIPO makes of it; every tensor is [NUM_TOKENS]."""

    shift: Tensor
    """log pi - log pi_old."""
    takes_part: Tensor
    """bool, whether the shift enters Future-KL."""
    future_kl: Tensor
    weights: Tensor


def made_up_response() -> Response:
    """Small noise, a passage that became likelier, one that became less likely, and one token out of all proportion."""
    generator = torch.Generator().manual_seed(0)
    shift = 0.004 * torch.randn(NUM_TOKENS, generator=generator)
    shift[RAISED.start : RAISED.stop] += 0.025
    shift[LOWERED.start : LOWERED.stop] -= 0.03
    shift[EXTREME] = math.log(12)
    ratio, advantages = shift.exp(), torch.ones(NUM_TOKENS)
    takes_part = participates(ratio, OBJECTIVE)
    x = torch.where(takes_part, shift, 0.0)
    values = future_kl(x, torch.tensor([0, NUM_TOKENS]), OBJECTIVE.half_life_tokens)
    return Response(shift, takes_part, values, influence_weights(values, ratio, advantages, OBJECTIVE))


def loss_curve(ratios: Tensor, advantage: float, unclipped_weight: float) -> Tensor:
    """Loss of one token at each ratio, where exp(F) is unclipped_weight."""
    advantages = torch.full_like(ratios, advantage)
    sums = torch.full_like(ratios, math.log(unclipped_weight))
    return clipped_token_loss(
        ratios.log(), influence_weights(sums, ratios, advantages, OBJECTIVE) * advantages, OBJECTIVE
    )


@dataclass(frozen=True)
class ShardedSum:
    """Future-KL of the response as CP_SIZE ranks compute it; tensors are [NUM_TOKENS] in the response's order."""

    own: Tensor
    """Each chunk's own sum."""
    behind: Tensor
    """What the tokens after the chunk add."""
    chunk_tokens: int
    ranks: tuple[int, ...]
    """Rank of each chunk."""


def sharded_sum(response: Response) -> ShardedSum:
    """`parallel.cp_suffix_sum` for all ranks in one process: the all-gather is a stack."""
    x = torch.where(response.takes_part, response.shift, 0.0)
    whole, half_life = torch.tensor([0, NUM_TOKENS]), OBJECTIVE.half_life_tokens
    cu_segments = cp_layout.local_cu_segments(whole, CP_SIZE)
    rows = [cp_layout.local_indices(whole, CP_SIZE, rank) for rank in range(CP_SIZE)]
    sums = [segment_suffix_sum(x[own_rows], cu_segments, half_life) for own_rows in rows]
    heads = torch.stack([segment_heads(local, cu_segments).view(1, 2) for local in sums])
    chunk = torch.tensor([NUM_TOKENS // cp_layout.num_chunks_of(CP_SIZE)])
    carries = carries_into_chunks(heads, chunk, half_life)
    own, behind = torch.empty(NUM_TOKENS), torch.empty(NUM_TOKENS)
    for rank, own_rows in enumerate(rows):
        own[own_rows] = sums[rank]
        carry = torch.stack([carries[rank, 0], carries[-1 - rank, 0]]).repeat_interleave(cu_segments.diff())
        behind[own_rows] = decay_to_end(cu_segments, half_life) * carry
    return ShardedSum(own, behind, int(chunk), (*range(CP_SIZE), *reversed(range(CP_SIZE))))


def draw_sharded() -> Figure:
    """A chunk's own sums, and what is added to them."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    upper = figure.add_subplot(2, 1, 1)
    lower = figure.add_subplot(2, 1, 2, sharex=upper)
    response, sharded = made_up_response(), sharded_sum(made_up_response())
    tokens, size = torch.arange(NUM_TOKENS), sharded.chunk_tokens
    for chunk, rank in enumerate(sharded.ranks):
        part = slice(chunk * size, (chunk + 1) * size)
        colour = (BLUE, RED)[rank]
        for axes in (upper, lower):
            axes.axvspan(part.start, part.stop, color=("#eaf1f9", "#faeceb")[rank], zorder=0, linewidth=0)
            axes.axvline(part.stop, color="white", linewidth=2, zorder=1)
        upper.plot(tokens[part], sharded.own[part], color=colour)
        upper.plot(part.start, sharded.own[part.start], "o", color=colour, markersize=5)
        label = "from behind the chunk" if not chunk else None
        lower.plot(tokens[part], sharded.behind[part], color=GREY, linestyle="--", linewidth=1, label=label)
        upper.text(part.start + size / 2, 0.35, f"chunk {chunk}, rank {rank}", fontsize=8, color=colour, ha="center")
    lower.plot(tokens, sharded.own + sharded.behind, color=GREEN, label="own sum + that")
    lower.plot(tokens[::8], response.future_kl[::8], ".", color="black", markersize=3, label="one process")
    lower.legend(fontsize=8, frameon=False, loc="upper right")
    lower.set_xlabel("token of the response", fontsize=8)
    lower.set_xlim(-2, NUM_TOKENS)
    _title(upper, "each chunk's own sum; the dots, one number a chunk, go to the other rank")
    _title(lower, "with what lies behind the chunk: Future-KL of the whole response")
    for axes in (upper, lower):
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set_ylim(-0.32, 0.42)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def draw() -> Figure:
    """Three panels along the response, two of the loss."""
    figure = Figure(figsize=(8.6, 8.4), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=(1, 1, 1, 1.35))
    shifts = figure.add_subplot(grid[0, :])
    sums, weights = figure.add_subplot(grid[1, :], sharex=shifts), figure.add_subplot(grid[2, :], sharex=shifts)
    _draw_response(shifts, sums, weights, made_up_response())
    _draw_loss(
        figure.add_subplot(grid[3, 0]), advantage=1.0, title="4. loss of a token of advantage +1: flat above 1.28"
    )
    _draw_loss(figure.add_subplot(grid[3, 1]), advantage=-1.0, title="of advantage −1: flat below 0.8 and above 10")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def _draw_response(shifts: Axes, sums: Axes, weights: Axes, response: Response) -> None:
    tokens = torch.arange(NUM_TOKENS)
    shown = torch.where(response.takes_part, response.shift, 0.0)
    shifts.stairs(shown.clamp(min=0), fill=True, color=BLUE)
    shifts.stairs(shown.clamp(max=0), fill=True, color=RED)
    shifts.bar(EXTREME + 0.5, 0.05, width=1.0, color=GREY)
    shifts.annotate(
        "ratio 12: left out", (EXTREME, 0.05), (EXTREME + 6, 0.042), fontsize=8, color=GREY, va="center",
    )  # fmt: skip
    shifts.text(RAISED.start - 3, 0.036, "became likelier", fontsize=8, color=BLUE, ha="right")
    shifts.text(LOWERED.stop + 3, -0.032, "became less likely", fontsize=8, color=RED)
    shifts.set_ylim(-0.045, 0.055)
    _title(shifts, "1. log-prob shift  s = log π − log π_old, after some updates of the step")

    sums.axhline(0, color=GREY, linewidth=0.6)
    sums.plot(tokens, response.future_kl, color=BLUE)
    _half_life(sums)
    _title(sums, "2. Future-KL  F: shifts from the token on, each counted less with its distance (half-life 32 tokens)")

    unclipped = response.future_kl.exp()
    weights.axhspan(OBJECTIVE.influence_min, OBJECTIVE.influence_max, color="#eef3ea", zorder=0)
    weights.axhline(1, color=GREY, linewidth=0.6)
    weights.plot(tokens, unclipped, color=GREY, linewidth=1, linestyle="--", label="exp(F)")
    weights.plot(tokens, response.weights, color=GREEN, label="weight f")
    weights.legend(fontsize=8, loc="upper right", frameon=False)
    weights.set_xlabel("token of the response", fontsize=8)
    weights.set_xlim(0, NUM_TOKENS - 1)
    _title(weights, "3. influence weight  f = exp(F), clipped to [0.8, 1.2]; the advantage is multiplied by it")


def _half_life(axes: Axes) -> None:
    """A ruler of one half-life that ends where the raised passage begins."""
    half_life, end = OBJECTIVE.half_life_tokens, RAISED.start
    axes.annotate("", (end - half_life, -0.07), (end, -0.07), arrowprops={"arrowstyle": "<->", "color": GREY})
    axes.text(end - half_life / 2, -0.15, "one half-life", fontsize=8, color=GREY, ha="center")


def _draw_loss(axes: Axes, advantage: float, title: str) -> None:
    low, high, dual_clip = 1 - OBJECTIVE.clip_ratio_low, 1 + OBJECTIVE.clip_ratio_high, OBJECTIVE.dual_clip
    assert dual_clip is not None
    edges = (high,) if advantage > 0 else (low, OBJECTIVE.safety_ratio, dual_clip)
    ratios = torch.logspace(math.log10(0.5), math.log10(20), 120)
    ratios = torch.cat([ratios, torch.tensor(edges), torch.tensor(edges) * 1.0001]).sort().values
    for weight, colour, style in ((0.8, RED, "-"), (1.0, GREY, "--"), (1.2, GREEN, "-")):
        label = f"exp(F) = {weight:g}"
        axes.plot(ratios, loss_curve(ratios, advantage, weight), color=colour, linestyle=style, label=label)
    for edge in edges:
        axes.axvline(edge, color=GREY, linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    ticks = (0.5, low, high, OBJECTIVE.safety_ratio, 5, dual_clip, 20)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ratio r = exp(s)", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="upper right" if advantage > 0 else "upper left")
    _title(axes, title)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=9, loc="left")


def main() -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/fipo.md.")
    parser.add_argument("--output", type=Path, default=TARGET, metavar="DIR", help="(default: docs/figures)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="(default: svg)")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("fipo", draw()), ("context_parallel", draw_sharded())):
        # The same file each time: no date, no random names.
        with mpl.rc_context({"svg.hashsalt": "megatron_fipo"}):
            metadata = {"Date": None} if arguments.format == "svg" else None
            figure.savefig(folder / f"{name}.{arguments.format}", dpi=130, metadata=metadata)


if __name__ == "__main__":
    main()
