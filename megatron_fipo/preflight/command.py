"""`megatron-fipo preflight`: memory, work and time of a run, without a GPU and without building the model."""

from __future__ import annotations

import argparse

from megatron_fipo.system.command_line import add_config_arguments, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Compute memory, work and time of a run on GPUs, without one and without building the model, and say what is "
        "missing or cannot work. The exit status is 0 if it fits, 1 if not, 2 if the configuration cannot be used."
    )
    add_config_arguments(parser)
    parser.add_argument("--world-size", type=count, metavar="N", help="training GPUs (default: one copy of the model)")
    parser.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--gpu", default="h100-80gb", help="a100-80gb, h100-80gb (default), h200 or b200")
    parser.add_argument("--model-config", metavar="FILE", help="config.json of a model whose folder is not here")
    parser.add_argument("--sizes-only", action="store_true", help="do not look for model, tokenizer and data files")
    parser.add_argument("--mfu", type=float, help="share of the peak in training (default: estimated)")
    parser.add_argument(
        "--rollout-tokens-per-s", type=float, metavar="N", help="of each GPU (default: estimated from its bandwidth)"
    )
    parser.add_argument("--response-tokens", type=float, metavar="N", help="mean (default: half the longest)")
    parser.add_argument("--prompt-tokens", type=float, metavar="N", help="mean (default: a quarter of the longest)")
    parser.add_argument("--kept-share", type=float, default=0.5, help="of groups, by dynamic sampling (default: 0.5)")
    parser.add_argument(
        "--schedules",
        action="store_true",
        help="simulate schedules of generation and training",
    )
    parser.add_argument(
        "--calibrate",
        metavar="RUN",
        help="the same, with lengths and speed as measured by a run with this configuration",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print tables and verdict. Returns the exit status, see `tables.report`."""
    from megatron_fipo.config import load_config
    from megatron_fipo.preflight.tables import Options, report
    from megatron_fipo.preflight.work import Assumptions

    config = load_config(arguments.config, arguments.overrides)
    options = Options(
        world_size=arguments.world_size,
        gpus_per_node=arguments.gpus_per_node,
        gpu=arguments.gpu,
        model_config=arguments.model_config,
        check_files=not arguments.sizes_only,
        schedules=arguments.schedules or arguments.calibrate is not None,
        calibrate=arguments.calibrate,
        assumptions=Assumptions(
            mfu=arguments.mfu,
            rollout_tokens_per_s=arguments.rollout_tokens_per_s,
            response_tokens=arguments.response_tokens,
            prompt_tokens=arguments.prompt_tokens,
            kept_share=arguments.kept_share,
        ),
    )
    return report(config, options)
