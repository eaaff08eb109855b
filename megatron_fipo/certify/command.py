"""`megatron-fipo certify`: training under every layout, compared with one process."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from megatron_fipo.system.command_line import add_config_arguments, count
from megatron_fipo.system.exit_codes import EXIT_FAULT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Train a few updates under your objective in every layout, and compare gradients, loss, influence weights, "
        "Future-KL and weights with one process. Leaves with 1 if a bound is broken."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--layouts", metavar="NAMES", default="", help="comma-separated, such as cp2,tp2+sp,dp2+cp2+recompute-full"
    )
    parser.add_argument(
        "--negative-controls", action="store_true", help="also make deliberate mistakes, each of which must be caught"
    )
    parser.add_argument(
        "--model",
        choices=("small", "as-is"),
        help="a small random model of the configuration's kind, or its own (default: small without GPUs, as-is with)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: float32)"
    )
    parser.add_argument("--steps", type=count, default=3, metavar="N", help="training steps (default: 3)")
    parser.add_argument("--updates", type=count, default=8, metavar="N", help="updates in each step (default: 8)")
    parser.add_argument(
        "--longest-response", type=count, default=120, metavar="TOKENS", help="of the synthetic ones (default: 120)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Certify, and print the certificate. Returns the exit status, see `certificate.certify`."""
    import torch

    from megatron_fipo.certify.certificate import certify
    from megatron_fipo.certify.runner import Options
    from megatron_fipo.config import load_config, validate
    from megatron_fipo.hub.models import model_folder
    from megatron_fipo.parallel.local_ranks import RankError

    config = load_config(arguments.config, arguments.overrides)
    validate(config)
    path = model_folder(config.model.path, config.model.revision)
    config = replace(config, model=replace(config.model, path=path))
    options = Options(
        layouts=tuple(name.strip() for name in arguments.layouts.split(",") if name.strip()),
        as_is=(arguments.model or ("as-is" if torch.cuda.is_available() else "small")) == "as-is",
        negative_controls=arguments.negative_controls,
        num_steps=arguments.steps,
        num_updates=arguments.updates,
        longest_response=arguments.longest_response,
        dtype=arguments.dtype,
    )
    try:
        return certify(config, options)
    except RankError as error:
        print(f"megatron-fipo certify: {error}", file=sys.stderr)
        return EXIT_FAULT
