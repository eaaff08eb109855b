"""What `megatron-fipo preflight` prints: tables and a verdict."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_fipo.config import (
    Config,
    ConfigError,
    longest_sequence_tokens,
    read_model_config,
    validate,
    validate_model_layout,
    without_secrets,
)
from megatron_fipo.config.text_files import read_json_object
from megatron_fipo.hub.models import model_config_folder
from megatron_fipo.hub.names import HubError
from megatron_fipo.preflight.findings import FAILS, MISSING, WARNS
from megatron_fipo.preflight.hardware import GPUS
from megatron_fipo.preflight.parameters import whole_parameters
from megatron_fipo.preflight.plan import Plan, make_plan
from megatron_fipo.preflight.schedules.calibration import read_run, with_lengths, with_speed
from megatron_fipo.preflight.schedules.comparison import ScheduleAssumptions, compare, fill_of
from megatron_fipo.preflight.schedules.table import show_schedules
from megatron_fipo.preflight.work import Assumptions
from megatron_fipo.system.exit_codes import EXIT_BAD_INPUT, EXIT_FAULT
from megatron_fipo.system.text_hygiene import clean_text

WIDTH = 120


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        world_size: training processes, one for each GPU; None takes one copy of the model.
        gpus_per_node: GPUs of one node, those of dedicated servers included.
        gpu: a name in `GPUS`.
        model_config: a config.json instead of the one in model.path, which need not be here.
        check_files: whether model, tokenizer and data must be here.
        schedules: whether to simulate schedules, too.
        calibrate: folder of a run from which they take lengths and speed.
    """

    world_size: int | None = None
    gpus_per_node: int = 8
    gpu: str = "h100-80gb"
    model_config: str | None = None
    check_files: bool = True
    schedules: bool = False
    calibrate: str | None = None
    assumptions: Assumptions = field(default_factory=Assumptions)


def report(config: Config, options: Options) -> int:
    """Print tables and verdict to standard output.

    Returns:
        0 if the run fits, EXIT_FAULT if it does not, EXIT_BAD_INPUT if the configuration cannot run at all.
    """
    try:
        measured = read_run(options.calibrate) if options.calibrate else None
        if measured is not None:
            options = replace(options, assumptions=with_lengths(options.assumptions, measured))
        plan = plan_of(config, options)
        assumed = ScheduleAssumptions() if measured is None else with_speed(plan, measured)
        comparison = compare(plan, assumed) if options.schedules else None
    except ValueError as error:
        print(clean_text(without_secrets(f"megatron-fipo preflight: {error}")), file=sys.stderr)
        return EXIT_BAD_INPUT
    console = Console(width=WIDTH, highlight=False)
    show(plan, assumed, console)
    if comparison is not None:
        show_schedules(plan, comparison, assumed, console)
    return 0 if plan.fits else EXIT_FAULT


def plan_of(config: Config, options: Options) -> Plan:
    """Validate and compute.

    Raises:
        ValueError: a configuration that cannot run, a layout that does not divide, a model that is not known.
    """
    if options.gpu not in GPUS:
        raise ValueError(f"--gpu {options.gpu}: must be one of {', '.join(GPUS)}.")
    parallel = config.parallel
    world_size = options.world_size or parallel.tp * parallel.pp * parallel.cp
    validate(config, world_size)
    model_config = _model_config(config, options)
    validate_model_layout(config, model_config)
    return make_plan(
        config,
        model_config,
        GPUS[options.gpu],
        world_size,
        options.assumptions,
        check_files=options.check_files,
        gpus_per_node=options.gpus_per_node,
    )


def _model_config(config: Config, options: Options) -> dict[str, Any]:
    if options.model_config is None:
        try:
            folder = model_config_folder(config.model.path, config.model.revision)
        except HubError as error:
            raise ConfigError(f"{error}\nOr name the model's config.json with --model-config.") from error
        if not Path(folder).is_dir():
            raise ConfigError(
                f"model.path={config.model.path} is no folder here, and its sizes are needed. Name the model's "
                "config.json with --model-config."
            )
        return read_model_config(folder)
    return read_json_object(Path(options.model_config), f"--model-config {options.model_config}")


def show(plan: Plan, assumed: ScheduleAssumptions, console: Console) -> None:
    """Print the tables, the findings and the verdict."""
    for table in (_layout(plan), _memory(plan), _peaks(plan), _rollout(plan, assumed), _batch(plan), _cost(plan)):
        console.print(table)
        console.print()
    for level, mark in ((WARNS, "warning"), (MISSING, "missing"), (FAILS, "FAILS")):
        for finding in plan.findings:
            if finding.level == level:
                console.print(f"{mark}: {without_secrets(finding.text)}", markup=False)
    console.print(f"\n[bold]{_verdict(plan)}[/bold]")


def _verdict(plan: Plan) -> str:
    num_fails = sum(finding.level == FAILS for finding in plan.findings)
    num_missing = sum(finding.level == MISSING for finding in plan.findings)
    hardware = f"{plan.world_size} x {plan.gpu.name}"
    if num_fails:
        return f"Verdict: does not fit {hardware} ({num_fails} problem{'s' if num_fails > 1 else ''})"
    if num_missing:
        return f"Verdict: fits {hardware}, but {num_missing} thing{'s are' if num_missing > 1 else ' is'} missing here"
    return f"Verdict: fits {hardware}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", expand=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _layout(plan: Plan) -> Table:
    parallel, config = plan.config.parallel, plan.config
    table = _table(f"Layout of {config.run.name}", "", "value")
    virtual = f" (virtual {parallel.virtual_pp})" if parallel.virtual_pp else ""
    sequence = ", sequence parallel" if parallel.sequence_parallel else ""
    table.add_row("parameters", f"{whole_parameters(plan.shape):,}")
    table.add_row("training GPUs", f"{plan.world_size} x {plan.gpu.name} ({plan.gpu.memory_gib:.1f} GiB)")
    table.add_row(
        "tp x pp x cp x dp",
        f"{parallel.tp} x {parallel.pp}{virtual} x {parallel.cp} x {plan.batch.data_ranks}{sequence}",
    )
    fp8 = "" if config.model.fp8 == "none" else f" with FP8 ({config.model.fp8})"
    table.add_row("dtype, recompute", f"{config.model.dtype}{fp8}, {config.model.recompute}")
    table.add_row("optimizer state over", f"{_state_shards(plan)} rank{'s' if _state_shards(plan) > 1 else ''}")
    table.add_row("tokens of a microbatch, on one GPU", f"{config.batch.max_tokens_per_microbatch // parallel.cp:,}")
    return table


def _state_shards(plan: Plan) -> int:
    return plan.batch.data_ranks * plan.config.parallel.cp if plan.config.optimizer.distributed else 1


def _memory(plan: Plan) -> Table:
    table = _table(
        "Memory of each GPU at the peak of an update, GiB",
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "log-probs",
        "other",
        "reserve",
        "total",
        "free",
    )
    for stage in plan.stages:
        values = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.log_probs)
        other = stage.reference + stage.rollout_engine + stage.fp8_weights
        free = plan.gpu.memory_gib - stage.training
        numbers = (*values, other, stage.reserve, stage.training, free)
        table.add_row(str(stage.stage), f"{stage.parameters / 1e6:,.1f} M", *(f"{value:.2f}" for value in numbers))
    return table


def _peaks(plan: Plan) -> Table:
    table = _table(
        "When a GPU is fullest, GiB",
        "when",
        "actor",
        "activations",
        "server's weights",
        "keys, values",
        "on the way",
        "rest",
        "total",
        "free",
    )
    for peak in plan.peaks:
        parts = (peak.actor, peak.passing, peak.server_weights, peak.pool, peak.on_the_way, peak.rest)
        cells = [f"{part:.2f}" if part else "" for part in parts]
        table.add_row(peak.moment, *cells, f"{peak.total:.2f}", f"{plan.gpu.memory_gib - peak.total:.2f}")
    return table


def _rollout(plan: Plan, assumed: ScheduleAssumptions) -> Table:
    table = _table("Generation", "", "value")
    rollout, server = plan.rollout, plan.server
    table.add_row("engine", f"{plan.config.rollout.engine}, {rollout.label}")
    table.add_row("GPUs of a server, servers", f"{rollout.tp}, {rollout.num_gpus // rollout.tp}")
    if plan.host.actor:
        table.add_row("the actor in host memory, GiB a node", f"{plan.host.actor:.1f}")
    if plan.host.snapshot:
        table.add_row("weights on their way to disk in host memory, GiB on the first node", f"{plan.host.snapshot:.1f}")
    table.add_row("server's weights, GiB a GPU", f"{server.weights:.2f}")
    table.add_row("room for keys and values, GiB a GPU", f"{server.pool:.2f}")
    longest = longest_sequence_tokens(plan.config)
    table.add_row(
        "tokens that fit, longest responses", f"{server.pool_tokens:,}, {server.pool_tokens / longest:,.1f} at a time"
    )
    try:
        fill = fill_of(plan, assumed)
    except ValueError as error:
        table.add_row("how stale tokens must be to fill the servers", f"not known: {error}")
        return table
    table.add_row("responses in flight when the servers are full", f"{fill.servers * fill.each:,}")
    table.add_row(
        "how stale tokens must be to fill the servers",
        f"{fill.steps:.2f} steps: these, of {fill.needed:,.0f} that a step needs",
    )
    table.add_row("rollout.max_staleness_steps that fills them, yours", _bounds(fill.bound, plan.config))
    return table


def _bounds(filling: int, config: Config) -> str:
    """The bound on staleness that fills the servers beside the configuration's."""
    own = config.rollout.max_staleness_steps
    return f"{filling}, {own}" + (", which gains nothing more" if own > filling else "")


def _batch(plan: Plan) -> Table:
    table, batch, rollout = _table("Batch of one step", "", "value"), plan.batch, plan.config.rollout
    table.add_row(
        "prompts trained on x responses",
        f"{rollout.num_prompts} x {rollout.num_samples_per_prompt} = {batch.samples:,}",
    )
    begun = f"{batch.prompts_generated:,} ({batch.samples_generated:,} responses)"
    if rollout.max_staleness_steps:
        table.add_row("prompts used on average, begun ahead at most", f"{begun}, {batch.prompts_ahead:,}")
    elif plan.config.sampling.streaming:
        table.add_row("prompts begun, of them needed on average", f"{begun}, {batch.prompts_needed:,}")
    else:
        table.add_row("prompts generated, in rounds", f"{begun}, {batch.rounds}")
    table.add_row("updates (optimizer steps)", str(batch.updates))
    prompts = rollout.num_prompts // plan.config.train.num_minibatches
    table.add_row("responses per update", f"{batch.samples_per_update:,} of {prompts} prompts")
    table.add_row("microbatches per update and data-parallel rank", f"at least {batch.microbatches}")
    table.add_row("pipeline bubble", f"{batch.bubble:.1%}")
    return table


def _cost(plan: Plan) -> Table:
    cost, assumptions, config = plan.cost, plan.assumptions, plan.config
    prompt, response = assumptions.resolve(config)
    table = _table("Estimate of one step", "", "value", "assumes")
    kept = f", {assumptions.kept_share:.0%} of groups kept" if config.sampling.dynamic else ""
    table.add_row(
        "tokens generated", f"{cost.tokens_generated:.3e}", f"{response:,.0f} a response, {prompt:,.0f} a prompt{kept}"
    )
    table.add_row("tokens trained on", f"{cost.tokens_trained:.3e}", "")
    for phase, flops in cost.flops.items():
        if flops:
            table.add_row(f"FLOPs, {phase}", f"{flops:.3e}", "")
    basis = f"{cost.rollout_tokens_per_s:,.0f} tokens/s a GPU; bound by {cost.rollout_limit}"
    share = f"MFU {assumptions.mfu:.0%}" if assumptions.mfu else f"kernels at {assumptions.training_efficiency:.0%}"
    share += f" of the peak, bubble {plan.batch.bubble:.1%}"
    assumed = {"generation": basis, "log-probs": share, "updates": share}
    for phase, seconds in cost.seconds.items():
        table.add_row(f"seconds, {phase}", f"{seconds:,.0f}", assumed[phase])
    if cost.waiting_seconds:
        links = plan.gpu.link_bandwidth * assumptions.link_efficiency / 1e9
        table.add_row(
            "seconds of these, GPUs waiting for each other",
            f"{cost.waiting_seconds:,.0f}",
            f"{links:.0f} GB/s within a node, {assumptions.network_bytes_per_s / 1e9:.0f} between nodes",
        )
    table.add_row("MFU of log-probs and updates", f"{cost.mfu:.1%}", "recomputation does not count as work")
    gpus = plan.world_size + (plan.rollout.num_gpus if plan.rollout.is_dedicated else 0)
    hours = cost.step_seconds / 3600
    table.add_row("seconds of a step", f"{cost.step_seconds:,.0f}", "phases one after the other")
    table.add_row("GPU-hours of a step", f"{hours * gpus:,.1f}", f"{gpus} GPUs")
    steps = config.train.num_steps
    table.add_row(
        f"GPU-hours of {steps:,} steps",
        f"{hours * gpus * steps:,.0f}",
        f"{hours * steps / 24:,.1f} days; without evaluations",
    )
    return table
