"""What `megatron-fipo preflight --schedules` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_fipo.preflight.plan import Plan
from megatron_fipo.preflight.schedules.comparison import Comparison, ScheduleAssumptions


def show_schedules(plan: Plan, comparison: Comparison, assumptions: ScheduleAssumptions, console: Console) -> None:
    """Print the table, what it assumes, and how stale tokens must be to fill the servers."""
    console.print()
    console.print(_table(comparison))
    for line in (*_fill(comparison), *_assumed(plan, comparison, assumptions)):
        console.print(line, markup=False)


def _table(comparison: Comparison) -> Table:
    gpus = comparison.setup.gpus
    table = Table(title=f"Schedules, simulated on {gpus} GPUs", title_justify="left", title_style="bold", expand=False)
    columns = ("", "step, s", "speed", "generation", "training", "no work", "dropped", "wasted", "staleness")
    for column in (*columns, "response"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    today = comparison.outcomes[0].seconds
    for outcome in comparison.outcomes:
        table.add_row(
            outcome.name,
            _seconds(outcome.seconds),
            f"{today / outcome.seconds:.2f}x",
            _seconds(outcome.generation),
            _seconds(outcome.training),
            f"{outcome.without_work:.0%}",
            f"{outcome.dropped:.0%}",
            f"{outcome.wasted:.0%}",
            f"{outcome.staleness:.2f}, {outcome.stalest}",
            f"{outcome.response:,.0f}",
        )
    table.add_row("ideal", _seconds(comparison.ideal), f"{today / comparison.ideal:.2f}x")
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.3g}"


def _fill(comparison: Comparison) -> list[str]:
    fill = comparison.fill
    lasts = fill.steps * fill.longest
    return [
        f"To keep all servers full, tokens must be {fill.steps:.2f} steps old: {fill.servers} servers x {fill.each} "
        f"responses in flight, over {fill.needed:,.0f} that a step needs. The longest response, {fill.longest:.1f} "
        f"times the mean, then takes {lasts:.1f} steps, and rollout.max_staleness_steps={fill.bound} does it."
    ]


def _assumed(plan: Plan, comparison: Comparison, assumptions: ScheduleAssumptions) -> list[str]:
    workload, setup, decoding = comparison.workload, comparison.setup, comparison.setup.decoding
    lengths = workload.lengths
    full = decoding.saturated(workload.context)
    alone = 1000 * decoding.seconds(1, lengths.prompt, 1)
    together = 1000 * decoding.seconds(full, round(full * workload.context), 1)
    rate = decoding.tokens_per_s(workload.context) / setup.server_gpus
    lines = [
        "Rounds are as the configuration has them. Spread: any server takes any response. Streaming: prompts one by "
        "one in order, until the first mixed groups fill the batch; exactly on-policy. Carry-over: the same with "
        "rollout.max_staleness_steps, which bounds how stale a token may be, and by how many steps prompts are begun "
        "ahead. Dedicated: a bound on how many steps before its training a prompt is started.",
        "Staleness, mean and most: steps between the weights that wrote a token and those that it trains first. Dropped"
        ": tokens of groups without a signal. Wasted: tokens that nothing needed. Response: mean length trained on.",
        "Assumed:",
        f"- responses of {lengths.mean:,.0f} tokens on average and {lengths.longest:,} at most, prompts of "
        f"{lengths.prompt:,}; logarithms of lengths spread by {lengths.between:.2f} between prompts and "
        f"{lengths.within:.2f} within; wrong responses {lengths.wrong:.2f} longer; {workload.kept:.0%} of groups kept;",
        f"- servers of {setup.server_gpus} GPUs with room for {decoding.pool:,} tokens: a decoding step takes "
        f"{alone:.1f} ms for one response and {together:.1f} ms for {full} of {workload.context:,.0f} tokens, which "
        f"is {rate:,.0f} tokens/s a GPU; a server claims at most {setup.claims} where responses are spread;",
        f"- hand-over of {setup.handover:.0f} s colocated, {assumptions.dedicated_handover_s:.0f} s dedicated with "
        "keys and values computed anew; nothing fails, and verifying takes no time.",
    ]
    if comparison.split:
        generating, training = comparison.split
        lines.append(f"- Dedicated: {generating} GPUs generate and {training} train, the best split that fits.")
    if assumptions.generation_factor != 1 or assumptions.training_factor != 1:
        lines.append(
            f"- Calibrated: generation takes {assumptions.generation_factor:.2f} times, training "
            f"{assumptions.training_factor:.2f} times what was computed."
        )
    return lines
