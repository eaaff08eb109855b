"""All the evidence that one GPU can give: speed, memory and exactness of every part, as JSON.

    python benchmarks/gpu_evidence.py PART[,PART ...] [SIZE ...] --out DIR [--device cpu --tiny]

PART is one of tests, future_kl, log_probs, actor, fp8, ablate, memory, sync, cluster, or all. benchmarks/README.md says
what each measures and in which order to run them. Each writes DIR/PART.json anew after every case. A case that fails is
noted and does not keep the next from running; one that hangs, or takes its process along, costs itself alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's packages, wherever the script is called from

from benchmarks.evidence import schema  # noqa: E402
from benchmarks.evidence.report import (  # noqa: E402
    DONE,
    FAILED,
    PARTS,
    PENDING,
    RUNNING,
    SIZES,
    SKIPPED,
    WITH_SIZES,
    Report,
    Settings,
)
from benchmarks.evidence.worker import EXIT_START_AGAIN, run_part  # noqa: E402

GRACE_S = 40.0
"""Time after the end of the budget at which a case that still runs is ended."""
_PRELOAD = ("megatron_fipo.certify.preload", "benchmarks.evidence.models")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", metavar="PART", help=f"of {', '.join(PARTS)}, comma-separated, or all")
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)}, for the parts with an actor")
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that show that the script works, and nothing else")
    parser.add_argument(
        "--budget-s", type=float, default=440.0, help="of a part; no case begins later; default: %(default)s"
    )
    parser.add_argument("--world-size", type=int, default=0, help="ranks of cluster; default: all GPUs, or 2 on a CPU")
    parser.add_argument("--server-python", help="interpreter with SGLang, for the colocated case of cluster")
    arguments = parser.parse_args()
    if unknown := set(arguments.sizes) - set(SIZES):
        parser.error(f"size {sorted(unknown)[0]} is not known; known are {', '.join(SIZES)}")
    _set_environment(arguments.device)
    parts = PARTS if arguments.parts == "all" else tuple(arguments.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"part {sorted(unknown)[0]} is not known; known are {', '.join(PARTS)}, all")
    if arguments.device == "cuda" and not _has_gpu():
        print(
            "gpu_evidence.py: there is no CUDA device. --device cpu --tiny shows that the script works.",
            file=sys.stderr,
        )
        return 2
    is_whole = True
    for part in parts:
        settings = Settings(
            part=part,
            sizes=tuple(arguments.sizes) if part in WITH_SIZES else (),
            device=arguments.device,
            tiny=arguments.tiny,
            out=arguments.out.resolve(),
            budget_s=arguments.budget_s,
            started_at=time.time(),
            command=shlex.join(sys.argv),
            warmup=1 if arguments.tiny else 3,
            repeats=2 if arguments.tiny else 10,
            server_python=arguments.server_python,
            world_size=arguments.world_size,
        )
        is_whole &= _run(settings)
    return 0 if is_whole else 1


def _set_environment(device: str) -> None:
    """Set environment variables for this process and all that it starts."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's advice, before CUDA starts
    os.environ["KINETO_LOG_LEVEL"] = "5"  # its remarks at each start and stop would hide the progress
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _has_gpu() -> bool:
    """Whether there is a GPU; a process that ends is asked, since this one must not start CUDA."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, check=False).returncode == 0


def _run(settings: Settings) -> bool:
    """Run a part in processes of its own until no case is pending. Returns whether all is done and whole."""
    Report.begin(settings)
    num_pending: int | None = None
    while True:
        process = _context(settings.device).Process(target=run_part, args=(settings,))
        process.start()
        process.join(max(settings.left_s, 0.0) + GRACE_S)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        report = Report.read(settings.path)
        _note_lost_case(report, process.exitcode, hangs)
        pending = report.with_status(PENDING)
        if len(pending) == num_pending:  # a process that cannot even begin would be started again for ever
            for case in pending:
                case |= {"status": FAILED, "reason": f"its process ended with exit code {process.exitcode} before it"}
            break
        num_pending = len(pending)
        if not pending or settings.left_s <= 0:
            break
    for case in report.with_status(PENDING):
        case |= {"status": SKIPPED, "reason": f"the budget of {settings.budget_s:.0f} s was used up"}
    report.content["seconds"] = round(time.time() - settings.started_at, 1)
    report.write()
    return _conclude(report)


def _context(device: str) -> multiprocessing.context.BaseContext:
    """CUDA does not survive a fork; on a CPU, processes are forked from one that has imported what they need."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def _note_lost_case(report: Report, exit_code: int | None, hangs: bool) -> None:
    """A case that its process did not come back from has failed."""
    if hangs:
        reason = f"it did not end within {GRACE_S:.0f} s of the end of the budget, and was killed"
    else:
        reason = f"its process ended with exit code {exit_code}"
    for case in report.with_status(RUNNING):
        case |= {"status": FAILED, "reason": reason}
        print(f"{report.content['name']}: {case['name']}: failed: {reason}", flush=True)
    if exit_code not in (0, EXIT_START_AGAIN) and not report.cases:
        report.cases.append({"name": "start", "status": FAILED, "reason": reason, "seconds": None, "values": {}})
    report.write()


def _conclude(report: Report) -> bool:
    failed = report.with_status(FAILED)
    breaches = schema.lacks(report.content)
    counts = ", ".join(f"{len(report.with_status(status))} {status}" for status in (DONE, SKIPPED, FAILED))
    print(f"{report.content['name']}: {counts}, {report.content['seconds']:.0f} s, {report.path}", flush=True)
    for breach in breaches:
        print(f"{report.content['name']}: the report is not whole: {breach}", file=sys.stderr, flush=True)
    return not failed and not breaches


if __name__ == "__main__":
    sys.exit(main())
