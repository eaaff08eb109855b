"""`megatron-fipo validate`: everything that can be said about a configuration without running it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_fipo.system.command_line import add_config_arguments, count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Check a configuration, that model and data files are there, and verifiers of your own; print it with every "
        "default filled in. Nothing is trained and nothing is fetched."
    )
    add_config_arguments(parser)
    parser.add_argument("--world-size", type=count, metavar="N", help="also check the layout for N processes")
    parser.add_argument(
        "--files-elsewhere",
        action="store_true",
        help="model and data are on another machine: only warn of what is missing",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the configuration and print it in full. Returns the exit status.

    Raises:
        ValueError: for a configuration that cannot run, or files that are not here.
    """
    from megatron_fipo.config import (
        load_config,
        places_of_relative_paths,
        read_model_config,
        resolved_yaml,
        validate,
        validate_model_layout,
        warnings_for,
        without_secrets,
    )
    from megatron_fipo.hub.models import cached_folder
    from megatron_fipo.preflight.findings import MISSING, file_findings
    from megatron_fipo.verifiers.check import inspect_own
    from megatron_fipo.verifiers.registry import also_look_in

    config = load_config(arguments.config, arguments.overrides)
    also_look_in(Path(arguments.config).parent)
    validate(config, arguments.world_size)
    model_config = None
    folder = cached_folder(config.model.path, config.model.revision)
    if folder is not None and (Path(folder) / "config.json").exists():
        model_config = read_model_config(folder)
        validate_model_layout(config, model_config)
    files = list(file_findings(config))
    missing = [finding.text for finding in files if finding.level == MISSING]
    fetched_later = [finding.text for finding in files if finding.level != MISSING]
    if missing and not arguments.files_elsewhere:
        raise ValueError(
            "\n".join([*missing, places_of_relative_paths(arguments.config)])
            + "\nWhere they are on another machine, the one that will train, add --files-elsewhere."
        )
    own = inspect_own(config)
    own.raise_problems()
    for warning in [*missing, *fetched_later, *own.warnings, *warnings_for(config, model_config)]:
        print(f"warning: {without_secrets(warning)}", file=sys.stderr)
    print(resolved_yaml(config), end="", flush=True)
    as_far = ", as far as that can be told here" if missing else ""
    print(f"{arguments.config} is valid{as_far}", file=sys.stderr)
    return 0
