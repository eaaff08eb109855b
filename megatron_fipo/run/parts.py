"""The parts of a run, built in an order that writes nothing for a run that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import VerifierSection, numbers_fingerprint, verifier_weights
from megatron_fipo.console.console import Console
from megatron_fipo.data.prompts import PromptStream, evaluation_sets
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.environments.single_turn import SingleTurn, decode_with, judge_in
from megatron_fipo.environments.verifier_probes import VerifierProbes
from megatron_fipo.evaluation.during_training import HeldOutEvaluation
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rollout.batch_source import SourceParts
from megatron_fipo.rollout.generation import GroupGenerator, build_engine, share_of
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.source import RolloutSource
from megatron_fipo.rollout.streaming import StreamingSource
from megatron_fipo.rollout.synchronous import SynchronousSource
from megatron_fipo.run.best_model import BestModel
from megatron_fipo.run.ending import Ending
from megatron_fipo.run.findings import first_prompts, told_by_all, told_by_leader
from megatron_fipo.run.named_on_hub import NamedRun
from megatron_fipo.run.records import RunRecords
from megatron_fipo.run.saved import SavedRun
from megatron_fipo.run.tracing import Tracing
from megatron_fipo.system.interrupt import Interrupt
from megatron_fipo.traces.texts import token_texts_with
from megatron_fipo.verifiers.check import Findings, inspect_own
from megatron_fipo.verifiers.isolation import isolation_warnings
from megatron_fipo.verifiers.pool import VerifierPool


class RunParts:
    """A run's model, rollout source, verifiers, records and saved state. Building it is collective over all ranks.

    `verifiers` is None on ranks that generate nothing: they judge nothing, and record nothing in the ledger.

    Args:
        named: the configuration, with what it names on the hub fetched.
        leave_if_asked: called on all ranks around each generation; raises where the run is to end.

    Raises:
        ValueError: if the model, the data or the layout cannot be used; the message says why.
    """

    def __init__(
        self, named: NamedRun, ranks: ParallelGroups, console: Console, leave_if_asked: Callable[[], None]
    ) -> None:
        config = named.local
        self.named, self.config, self.ranks, self.console = named, config, ranks, console
        tokenizer = load_tokenizer(config.model.path)
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.decode = decode_with(tokenizer)
        inspected = told_by_leader(lambda: inspect_own(config), ranks)
        prompts = PromptStream.from_config(config, tokenizer, inspected.row_readers)
        held_out = evaluation_sets(config, tokenizer, inspected.row_readers)
        share = share_of(config, ranks)
        sources = (*config.data.train.values(), *config.data.evaluation.values())
        in_use = sorted({name for source in sources for name in verifier_weights(source)})
        self.verifiers = None if share is None else _verifier_pool(config.verifier, in_use)
        try:
            probes = self.verifiers and VerifierProbes(self.verifiers, first_prompts(prompts, held_out))
            self.actor = Actor(config, ranks)  # while verifiers are imported and answer
            self.warnings = [
                *inspected.warnings,
                *isolation_warnings(in_use, config.verifier.trusted),
                *told_by_all(probes.findings() if probes else Findings(), ranks),
            ]
        except BaseException:
            self._close_verifiers()
            raise
        self.records = RunRecords(named, ranks, console)
        folder = self.records.folder
        engine = build_engine(config, ranks, share, tokenizer, folder.servers, may_be_joined=True)
        try:
            engine.start(self.actor)
        except BaseException:
            engine.close()
            raise
        self.ledger = RolloutLedger(folder.rollouts, ranks.rank, numbers_fingerprint(named.recorded), self.decode)
        environment = None if self.verifiers is None else SingleTurn(judge_in(self.verifiers), self.decode)
        generator = GroupGenerator(engine, environment, ranks, config.run.seed, self.ledger, leave_if_asked)
        self.interrupt = Interrupt(generator.abort)
        self.plane = DataPlane(ranks, share is not None)
        parts = SourceParts(config, ranks, prompts, engine, generator, self.plane, self.ledger, console)
        kind = StreamingSource if config.sampling.streaming else SynchronousSource
        self.source: RolloutSource = kind(parts)
        token_texts = token_texts_with(tokenizer)
        self.tracing = Tracing(config, ranks, self.plane, self.decode, token_texts, folder.traces)
        self.saved = SavedRun(config, self.actor, folder, self.ledger, console, named.recorded)
        self.ending = Ending(config.train.stop_when, folder.metrics, console.info)
        is_leader = ranks.rank == 0
        self.best = BestModel(config.checkpoint.keep_best, folder.best, self.saved.export, is_writer=is_leader)
        self.evaluation = HeldOutEvaluation(
            config, held_out, generator, self.plane, console, folder.evaluation if is_leader else None
        )

    def close(self) -> None:
        """Release processes, memory and the folder.

        Raises:
            DiskError: if an engine could not write what it still had to write; everything is released all the same.
        """
        with ExitStack() as last_first:
            for close in (self.records.close, self.ledger.close, self.source.close, self._close_verifiers):
                last_first.callback(close)

    def _close_verifiers(self) -> None:
        if self.verifiers is not None:
            self.verifiers.close()


def _verifier_pool(section: VerifierSection, in_use: Sequence[str]) -> VerifierPool:
    """A pool that imports its verifiers at the start: an import that came later would count as a response's time."""
    return VerifierPool(section.num_workers, section.timeout_s, verifiers=in_use, trusted=section.trusted)
