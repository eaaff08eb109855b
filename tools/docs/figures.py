"""Draws docs/figures/fipo.svg: what FIPO does to one made-up response, computed by the package itself.

python tools/docs/figures.py                    # write it; needs matplotlib
python tools/docs/figures.py --output FILE      # elsewhere; the ending (svg, png) decides the format
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
from megatron_fipo.rl.future_kl import future_kl
from megatron_fipo.rl.objective import clipped_token_loss, influence_weights, participates

TARGET = Path(__file__).resolve().parents[2] / "docs" / "figures" / "fipo.svg"
OBJECTIVE = FipoConfig(half_life_tokens=32.0, influence_min=0.8, influence_max=1.2, safety_ratio=3.0)
"""Of the paper's 7B recipe: its range shows both ends of the weights."""

NUM_TOKENS = 256
RAISED, LOWERED = range(104, 116), range(196, 206)
"""Tokens whose probability the updates so far have raised and lowered."""
EXTREME = 160
"""A token with a ratio above dual_clip, which Future-KL leaves out."""

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


def draw() -> Figure:
    """Three panels along the response, two of the loss."""
    figure = Figure(figsize=(8.6, 8.4), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=(1, 1, 1, 1.35))
    shifts = figure.add_subplot(grid[0, :])
    along = [shifts, *(figure.add_subplot(grid[row, :], sharex=shifts) for row in (1, 2))]
    _draw_response(*along, made_up_response())
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
    """Write the figure."""
    parser = argparse.ArgumentParser(description="Draw docs/figures/fipo.svg.")
    parser.add_argument("--output", type=Path, default=TARGET, metavar="FILE", help="(default: docs/figures/fipo.svg)")
    output: Path = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    # The same file each time: no date, no random names.
    with mpl.rc_context({"svg.hashsalt": "megatron_fipo"}):
        draw().savefig(output, dpi=130, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
