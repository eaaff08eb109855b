"""The command lines of the conversion: arguments, progress, and what is printed. Heavy imports wait until one runs."""

from __future__ import annotations

import argparse
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_fipo.system.exit_codes import EXIT_KILLED

if TYPE_CHECKING:
    import torch

    from megatron_fipo.convert.plan import Plan

_DTYPES = ("float32", "bfloat16", "float16")
_STOPPED = EXIT_KILLED + signal.SIGINT
"""Exit status that shells report for a program that Ctrl-C ended."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(add_arguments: Callable[[argparse.ArgumentParser], None], argv: Sequence[str] | None = None) -> int:
    """Run one of the commands below as a program of its own. Returns the exit status, see `run_conversion`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_conversion(args)


def run_conversion(args: argparse.Namespace) -> int:
    """Run the parsed command; errors whose message explains them go to stderr.

    Returns:
        0; 1 if a verification or a rank failed; 2 for unusable input; 3 if the disk or the machine failed; 130 after
        Ctrl-C.
    """
    from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
    from megatron_fipo.parallel.local_ranks import RankError
    from megatron_fipo.system.error_net import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, is_of_the_machine

    try:
        status: int = args.conversion(args)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        if hasattr(args, "target") and os.path.isdir(f"{args.target}.partial"):
            print(
                f"{args.target} is as it was before. The part written so far stays in {args.target}.partial: when the "
                "cause is gone, the same command continues from there.",
                file=sys.stderr,
            )
        is_failed_write = error.errno is None  # safetensors gives no errno
        return EXIT_STOPPED if is_failed_write or is_of_the_machine(error) else EXIT_BAD_INPUT
    except (ValueError, RankError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        is_the_answer = args.conversion is _verify or isinstance(error, RankError)
        return EXIT_FAULT if is_the_answer else EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; the same command continues from the files that are whole", file=sys.stderr)
        return _STOPPED
    return status


def add_hf_to_megatron(parser: argparse.ArgumentParser) -> None:
    """Arguments of hf_to_megatron."""
    parser.description = "Write a Hugging Face folder as a Megatron checkpoint (torch_dist), loadable in any layout."
    parser.add_argument(
        "source", metavar="HF_FOLDER", help="Hugging Face folder with *.safetensors, or a name on the hub"
    )
    _add_common(parser)
    parser.add_argument("--file-size", type=_size, default="2GB", metavar="SIZE", help="size of a file (default: 2GB)")
    parser.set_defaults(conversion=_hf_to_megatron)


def add_megatron_to_hf(parser: argparse.ArgumentParser) -> None:
    """Arguments of megatron_to_hf."""
    parser.description = "Write a Megatron checkpoint (torch_dist) as a Hugging Face folder."
    parser.add_argument(
        "source",
        metavar="MEGATRON",
        help="as hf_to_megatron wrote it, a run's checkpoints/step_NNNNNN, or a run's folder for its newest checkpoint",
    )
    _add_common(parser)
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="take config, tokenizer and generation config from here (default: MEGATRON, or the run's model.path)",
    )
    parser.add_argument("--shard-size", type=_size, default="2GB", metavar="SIZE", help="size of a file (default: 2GB)")
    parser.set_defaults(conversion=_megatron_to_hf)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of verify."""
    parser.description = (
        "Check a Hugging Face folder, that other folders hold the same weights bit for bit, and that Megatron computes "
        "the same logits from them."
    )
    parser.add_argument(
        "source", metavar="HF_FOLDER", help="the reference that others must equal; or a name on the hub"
    )
    parser.add_argument("others", metavar="OTHER", nargs="*", help="Megatron checkpoints and Hugging Face folders")
    parser.add_argument("--base", metavar="FOLDER", help="config of a Megatron checkpoint that has none of its own")
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the others (default: the source's)")
    parser.add_argument("--write-checksums", metavar="FILE", help="write a checksum of each tensor of HF_FOLDER")
    parser.add_argument("--checksums", metavar="FILE", help="compare HF_FOLDER with such a file")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="also run text through transformers and through Megatron, from the first Megatron checkpoint among OTHER, "
        "or from HF_FOLDER",
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallelism of --logits (default: 1)")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallelism of --logits (default: 1)")
    parser.add_argument(
        "--logits-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype to compute in (default: float32)",
    )
    parser.add_argument("--text", metavar="FILE", help="passages for --logits, by blank lines (default: some built in)")
    parser.set_defaults(conversion=_verify)


CONVERSIONS = {
    "hf-to-megatron": add_hf_to_megatron,
    "megatron-to-hf": add_megatron_to_hf,
    "verify": add_verify,
}
"""Name of a subcommand -> function that adds its arguments to a parser."""


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="OUT", help="folder to write; made whole or not at all")
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the written weights (default: the source's)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, once the new one is whole")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(KB|MB|GB)?", text.strip(), re.IGNORECASE)
    if not match or not (size := int(float(match[1]) * _UNITS[(match[2] or "").upper()])):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 2GB")
    return size


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _hf_to_megatron(args: argparse.Namespace) -> int:
    from megatron_fipo.convert.offline.to_megatron import plan_to_megatron
    from megatron_fipo.hub.models import model_folder

    source = model_folder(args.source, key="HF_FOLDER")
    if warning := _left_over(source):
        print(f"warning: {warning}", file=sys.stderr)
    conversion = plan_to_megatron(
        source,
        args.target,
        dtype=_dtype(args.dtype),
        file_bytes=args.file_size,
        overwrite=args.overwrite,
        needs_weights=not args.dry_run,
    )
    return _carry_out(conversion.plan, conversion.write, args.dry_run)


def _megatron_to_hf(args: argparse.Namespace) -> int:
    from megatron_fipo.convert.offline.run_checkpoint import find_checkpoint
    from megatron_fipo.convert.offline.to_hugging_face import plan_to_hugging_face
    from megatron_fipo.hub.models import model_folder

    source, base = find_checkpoint(args.source, model_folder(args.base, key="--base") if args.base else None)
    if str(source) != args.source:
        print(f"newest checkpoint: {source}", file=sys.stderr)
    conversion = plan_to_hugging_face(
        source,
        args.target,
        base=base,
        dtype=_dtype(args.dtype),
        shard_bytes=args.shard_size,
        overwrite=args.overwrite,
        needs_weights=not args.dry_run,
    )
    return _carry_out(conversion.plan, conversion.write, args.dry_run)


def _carry_out(plan: Plan, write: Callable[[Callable[[int], None]], None], dry_run: bool) -> int:
    from megatron_fipo.convert.plan import gigabytes

    if dry_run:
        _print_plan(plan)
        return 0
    start = time.monotonic()
    with _progress("converting", plan.num_bytes) as on_written:
        write(on_written)
    print(
        f"wrote {plan.target}: {len(plan.tensors)} tensors, {gigabytes(plan.num_bytes)}, in "
        f"{time.monotonic() - start:.1f} s; {_peak()}"
    )
    return 0


def _print_plan(plan: Plan) -> None:
    from megatron_fipo.convert.plan import gigabytes

    for tensor in plan.tensors:
        shape, dtype = " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")
        print(f"{tensor.name}  {shape}  {dtype}  {gigabytes(tensor.num_bytes)}")
    print()
    for name, size in plan.files:
        print(f"{plan.target}/{name}  {gigabytes(size)}")
    print(
        f"\n{len(plan.tensors)} tensors, {gigabytes(plan.num_bytes)} ({plan.num_bytes} bytes) in {len(plan.files)} "
        f"files; about {gigabytes(plan.peak_bytes)} of memory at the highest. Nothing was written."
    )


def _verify(args: argparse.Namespace) -> int:
    from megatron_fipo.convert.hf_config import read_model_shape
    from megatron_fipo.convert.offline.verification import read_checksums, verify_weights, write_checksums
    from megatron_fipo.convert.plan import gigabytes
    from megatron_fipo.hub.models import model_folder

    args.source = model_folder(args.source, key="HF_FOLDER")
    args.base = model_folder(args.base, key="--base") if args.base else None
    expected = read_checksums(args.checksums) if args.checksums else None
    start = time.monotonic()
    shape = read_model_shape(args.source)
    with _progress("comparing", _weight_bytes(args.source)) as on_done:
        verified = verify_weights(
            args.source, args.others, base=args.base, dtype=_dtype(args.dtype), expected=expected, on_done=on_done
        )
    if warning := _left_over(args.source):
        print(f"warning: {warning}", file=sys.stderr)
    for problem in verified.problems:
        print(f"error: {problem}", file=sys.stderr)
    if verified.problems:
        return 1
    with_others = "".join(f", the same in {other}" for other in args.others)
    print(
        f"{args.source}: {len(verified.checksums)} {shape.family} tensors, {gigabytes(verified.num_bytes)}, whole and "
        f"finite{with_others} ({time.monotonic() - start:.1f} s; {_peak()})"
    )
    if args.write_checksums:
        write_checksums(args.write_checksums, verified.checksums)
        print(f"wrote {args.write_checksums}")
    return _verify_logits(args) if args.logits else 0


def _verify_logits(args: argparse.Namespace) -> int:
    from pathlib import Path

    from megatron_fipo.convert.offline.logits import PASSAGES, compare_logits
    from megatron_fipo.convert.torch_dist import is_torch_dist

    checkpoint = next((other for other in args.others if is_torch_dist(Path(other))), None)
    passages = re.split(r"\n\s*\n", Path(args.text).read_text()) if args.text else PASSAGES
    start = time.monotonic()
    comparison = compare_logits(
        args.source, checkpoint, tp=args.tp, pp=args.pp, dtype=args.logits_dtype, passages=passages
    )
    layout = f"TP {args.tp} x PP {args.pp}, {args.logits_dtype}"
    print(f"{checkpoint or args.source} at {layout}: {comparison} ({time.monotonic() - start:.1f} s)")
    if not comparison.agrees:
        print("error: different: the actor and transformers do not compute the same logits", file=sys.stderr)
        return 1
    return 0


def _weight_bytes(folder: str) -> int:
    from megatron_fipo.convert.inspection import files_of_weights

    return sum(file.stat().st_size for file in files_of_weights(folder).files if file.is_file())


def _left_over(folder: str) -> str:
    from megatron_fipo.convert.inspection import files_of_weights

    return files_of_weights(folder).warning()


def _peak() -> str:
    from megatron_fipo.convert.plan import gigabytes

    return f"{gigabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of memory at the highest"


@contextmanager
def _progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda done: progress.advance(task, done)
