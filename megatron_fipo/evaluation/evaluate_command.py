"""`megatron-fipo evaluate`: scores of a Hugging Face folder on a configuration's evaluation data."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_fipo.system import uncollected
from megatron_fipo.system.command_line import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Score a model on the sources of data.evaluation: avg@k, cons@k and pass@k, printed and written to "
        "metrics.json, every judged response to problems.jsonl. Stopped, the same command generates what is missing."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--model", metavar="FOLDER", help="Hugging Face folder, or a name on the hub; by default model.path"
    )
    parser.add_argument("--output", metavar="FOLDER", help="by default evaluation/ in run.output_dir")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate. Returns the exit status."""
    from megatron_fipo.config import load_config, require_inputs, validate
    from megatron_fipo.verifiers.registry import also_look_in

    config = load_config(arguments.config, arguments.overrides)
    also_look_in(Path(arguments.config).parent)
    validate(config, is_for_training=False)
    is_unread = ("data.train.", *["model.path"] * bool(arguments.model))
    require_inputs(config, arguments.config, unread=is_unread)

    with uncollected.imports():
        from megatron_fipo.evaluation.of_folder import evaluate_and_report

    model = arguments.model or config.model.path
    return evaluate_and_report(config, model, Path(arguments.output or f"{config.run.output_dir}/evaluation"))
