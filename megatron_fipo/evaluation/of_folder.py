"""Evaluation of a Hugging Face folder on a configuration's held-out data, on any rollout engine, in one process.

Judged responses are recorded as they come. The same command after an interruption generates only what is missing.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import (
    Config,
    ParallelSection,
    read_model_config,
    values_for_comparison,
    verifier_weights,
    with_absolute_paths,
)
from megatron_fipo.console.console import Console
from megatron_fipo.convert.inspection import check_weights
from megatron_fipo.data.prompts import evaluation_sets
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.environments.single_turn import Decode, SingleTurn, decode_with, judge_in
from megatron_fipo.environments.verifier_probes import VerifierProbes, first_held_out
from megatron_fipo.evaluation.scores import (
    EVALUATION_STEP,
    ProblemResult,
    evaluate_problems,
    write_problems,
)
from megatron_fipo.hub.datasets import fetched_here
from megatron_fipo.hub.models import model_folder
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.rl.trajectory import Group, Prompt
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams
from megatron_fipo.rollout.generation import build_engine, in_process_engine, share_of
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.system.digests import fingerprint
from megatron_fipo.system.disk import DiskError, disk_error, write_text_whole
from megatron_fipo.system.error_net import is_of_the_machine
from megatron_fipo.system.event_loop import run_to_end
from megatron_fipo.system.exit_codes import EXIT_STOPPED
from megatron_fipo.system.interrupt import Interrupt
from megatron_fipo.verifiers.check import inspect_own
from megatron_fipo.verifiers.isolation import isolation_warnings
from megatron_fipo.verifiers.pool import VerifierPool


class EvaluationStoppedError(Exception):
    """A signal ended the evaluation; what was judged is recorded."""


def evaluate_folder(
    config: Config, model_path: str, console: Console, folder: Path
) -> tuple[dict[str, float], list[ProblemResult]]:
    """Generate and judge responses to every evaluation prompt of a configuration.

    Args:
        config: data.evaluation and evaluation say what and how, rollout.engine and servers on what.
        model_path: Hugging Face folder with the policy, or its name on the hub; model.revision is that of model.path.
        console: shows progress.
        folder: where responses are recorded, and those of an interrupted evaluation are found.

    Returns:
        Scores by flat name (`evaluate_problems`), and the problems behind them.

    Raises:
        ValueError: if the configuration has no evaluation data, or the folder no model.
        ServerError: if the rollout servers do not come up.
        DiskError: if a response could not be recorded.
        EvaluationStoppedError: after Ctrl-C or SIGTERM.
    """
    if not config.data.evaluation:
        raise ValueError("data.evaluation is empty: there is nothing to evaluate on. Name a source there.")
    model_path = model_folder(model_path, config.model.revision if model_path == config.model.path else None)
    read_model_config(model_path)
    if warning := check_weights(model_path):
        if config.rollout.engine != "in_process":  # a server may read the files that are left over, and in training the
            raise ValueError(warning)  # actor's weights then take their place; here nothing does
        console.warning(warning)
    # Sources on the hub are pinned to a commit before anything is recorded for them.
    sources = {
        name: fetched_here(source, f"data.evaluation.{name}") if source.kind == "hub" else source
        for name, source in config.data.evaluation.items()
    }
    config = replace(
        config, model=replace(config.model, path=model_path), data=replace(config.data, evaluation=sources)
    )
    tokenizer = load_tokenizer(model_path)
    inspected = inspect_own(config)
    inspected.raise_problems()
    for warning in inspected.warnings:
        console.warning(warning)
    sets = evaluation_sets(config, tokenizer, inspected.row_readers)
    decode = decode_with(tokenizer)

    _make(folder)
    ledger = RolloutLedger(folder / "responses", 0, _fingerprint(config), decode)
    if ledger.discard_others():
        console.warning("responses recorded for another model or other settings were found and deleted")
    with _engine(config, tokenizer, folder / "servers") as engine:
        try:
            groups = _judged_groups(config, sets, engine, ledger, decode, console)
        finally:
            ledger.close()
    problems = [ProblemResult.from_group(group) for group in groups]
    return evaluate_problems(problems), problems


def _make(folder: Path) -> None:
    """
    Raises:
        ValueError: if it cannot be a folder to write into.
        DiskError: if there is no room for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_of_the_machine(error) and error.errno != errno.EROFS:
            raise disk_error(folder, error) from error
        raise ValueError(
            f"{folder} cannot be the folder of an evaluation: {error.strerror or error}. Name another with --output."
        ) from error


def _judged_groups(
    config: Config, sets: Mapping[str, Sequence[Prompt]], engine: RolloutEngine, ledger: RolloutLedger, decode: Decode,
    console: Console,
) -> list[Group]:  # fmt: skip
    settings = config.evaluation
    prompts = [prompt for prompts in sets.values() for prompt in prompts]
    sampling = SamplingParams(
        max_tokens=settings.max_response_tokens or config.rollout.max_response_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    finished = ledger.finished(EVALUATION_STEP, 0, prompts)
    if finished:
        console.info(f"{len(finished)} responses are there from an evaluation that was interrupted")
    names = sorted({name for source in config.data.evaluation.values() for name in verifier_weights(source)})
    for warning in isolation_warnings(names, config.verifier.trusted):
        console.warning(warning)
    interrupt = Interrupt(engine.abort)
    with (
        _probed_pool(config, names, sets, console) as pool,
        console.evaluation_progress(len(prompts) * settings.num_samples_per_prompt) as progress,
        interrupt,
    ):
        progress.advance(len(finished))
        groups = run_to_end(
            generate_groups(
                engine,
                prompts,
                SingleTurn(judge_in(pool), decode),
                num_samples=settings.num_samples_per_prompt,
                sampling=sampling,
                run_seed=config.run.seed,
                step=EVALUATION_STEP,
                on_sample=ledger.recording(0, lambda sample: progress.advance()),
                finished=finished,
            )
        )
    if interrupt.received is not None:
        raise EvaluationStoppedError
    return groups


@contextmanager
def _probed_pool(
    config: Config, names: Sequence[str], sets: Mapping[str, Sequence[Prompt]], console: Console
) -> Iterator[VerifierPool]:
    """The verifiers' processes, once each verifier has answered a first call."""
    verifier = config.verifier
    with VerifierPool(verifier.num_workers, verifier.timeout_s, verifiers=names, trusted=verifier.trusted) as pool:
        findings = VerifierProbes(pool, first_held_out(sets)).findings()
        findings.raise_problems()
        for warning in findings.warnings:
            console.warning(warning)
        yield pool


@contextmanager
def _engine(config: Config, tokenizer: Any, folder: Path) -> Iterator[RolloutEngine]:
    """The configuration's rollout engine with the folder's weights, for this process alone."""
    if config.rollout.engine == "in_process":
        yield in_process_engine(config, tokenizer)
        return
    cpu.install()
    ranks = parallel_groups.initialize(ParallelSection(), config.run.seed)
    try:
        engine = build_engine(config, ranks, share_of(config, ranks), tokenizer, folder)
        try:
            engine.start(None)
            yield engine
        finally:
            engine.close()
    finally:
        parallel_groups.shut_down()


def _fingerprint(config: Config) -> str:
    """Digest of everything that decides responses and verdicts; files of weights count by name, size and time."""
    files = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in Path(config.model.path).glob("*")
    )
    decisive = {
        "files": files,
        "seed": config.run.seed,
        "dtype": config.model.dtype,
        "evaluation": asdict(config.evaluation),
        "data": values_for_comparison(with_absolute_paths(config))["data"]["evaluation"],
        "lengths": [config.rollout.max_prompt_tokens, config.rollout.max_response_tokens],
    }
    return fingerprint(decisive)


def evaluate_and_report(config: Config, model_path: str, folder: Path) -> int:
    """Evaluate, show a table, and write problems.jsonl and metrics.json.

    Args:
        config, model_path, folder: see `evaluate_folder`.

    Returns:
        0, or EXIT_STOPPED where a signal or the disk stopped it and the same command goes on.
    """
    console = Console(config)
    try:
        metrics, problems = evaluate_folder(config, model_path, console, folder)
    except EvaluationStoppedError:
        console.info("stopped by a signal; the same command generates what is missing")
        return EXIT_STOPPED
    except DiskError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED
    try:
        write_problems(folder / "problems.jsonl", problems)
        write_text_whole(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    except DiskError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_STOPPED
    console.evaluation_table(model_path, {name.removeprefix("evaluation/"): value for name, value in metrics.items()})
    console.info(f"problems and metrics: {folder}")
    return 0
