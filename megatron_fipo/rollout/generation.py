"""Groups of judged responses, generated on all ranks together, each on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.convert.dtypes import MODEL_DTYPES
from megatron_fipo.environments.environment import Environment
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups, device
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.parallel.waiting import Work
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import ALL_PROMPTS, RolloutEngine, SamplingParams, Share
from megatron_fipo.rollout.in_process.engine import InProcessEngine, find_stop_token_ids
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.servers.setup import build_server_engine, share_of_servers
from megatron_fipo.rollout.stream import Stream
from megatron_fipo.system.event_loop import InBackground, run_to_end


@dataclass(frozen=True)
class StreamOrder:
    """What a step's stream is to generate.

    Attributes:
        work: says which response is next, and whether any is wanted.
        key_of: the prompt and the key of a ticket's response.
        on_judged: called with each of this rank's judged trajectories, and with those found in the ledger.
        look: called now and then, on ranks that generate.
        carried: responses of this rank's that go on before any ticket is taken, with their prompts.
        keeps: keep what is begun and not judged. A repeatable engine then stops where all ranks meet.
        version: of the weights with which it begins; None: the step's own.
    """

    step: int
    work: OrderedWork
    sampling: SamplingParams
    key_of: Callable[[int], tuple[Prompt, SampleKey]]
    on_judged: Callable[[Prompt, Trajectory], None]
    look: Callable[[], None]
    carried: Sequence[tuple[Prompt, Carried]] = ()
    keeps: bool = False
    version: int | None = None


class GroupGenerator:
    """Generates judged groups with this rank's engine and verifiers, on all ranks together.

    In-process engines are on every rank, so every rank generates, whatever model-parallel group it belongs to. With
    servers the leader of each node does, and the others wait for it. What a rank has generated stays with it.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        environment: Environment | None,
        ranks: ParallelGroups,
        run_seed: int,
        ledger: RolloutLedger,
        leave_if_asked: Callable[[], None],
    ) -> None:
        """
        Args:
            environment: answers and judges; None where this rank generates nothing.
            ledger: records training's responses, and returns those that a killed run had recorded.
            leave_if_asked: called on all ranks before and after each generation; raises where the run is to end, so
                that no generation begins after the signal, and no response that was cut short counts as a whole one.
        """
        self._engine, self._environment, self._ranks = engine, environment, ranks
        self._run_seed, self._ledger, self.leave_if_asked = run_seed, ledger, leave_if_asked
        self._stream: Stream | None = None
        self._in_background: tuple[ExitStack, InBackground[None] | None] | None = None
        """What a stream in the background leaves when it is finished, and its thread, where this rank generates."""

    @property
    def share(self) -> Share | None:
        """Which prompts this rank generates for; None if for none."""
        return self._engine.share

    def generate(
        self,
        own_prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        step: int,
        on_sample: Callable[[Trajectory], None],
        round_index: int | None = None,
        only_recorded: bool = False,
    ) -> list[Group]:
        """Judged groups of this rank's prompts, in their order. Collective over all ranks.

        Args:
            own_prompts: those of its share; none where it generates nothing.
            step: part of the key of each response's randomness.
            on_sample: called with each of this rank's trajectories when it is judged, or found in the ledger.
            round_index: which of the step's rounds of generation this is, for the ledger; None keeps out of the ledger.
            only_recorded: take every response from the ledger: the policy that wrote them is gone.

        Raises:
            ValueError: if the ledger is damaged, or lacks a response with `only_recorded`.
            OtherRankError: if generation failed on another rank.
        """
        self.leave_if_asked()
        finished = self._finished(step, round_index, own_prompts, num_samples)
        if only_recorded:
            self.check_complete(step, len(own_prompts) * num_samples - len(finished))
        for sample in finished.values():
            on_sample(sample)
        if round_index is not None:
            on_sample = self._ledger.recording(round_index, on_sample)
        with Work(self._ranks.world, f"generation in step {step}", on_failure_elsewhere=self._engine.abort):
            own: list[Group] = []
            if self._environment is not None:
                own = run_to_end(
                    generate_groups(
                        self._engine,
                        own_prompts,
                        self._environment,
                        num_samples=num_samples,
                        sampling=sampling,
                        run_seed=self._run_seed,
                        step=step,
                        on_sample=on_sample,
                        finished=finished,
                    )
                )
            if round_index is not None:
                self._ledger.secure()
        self.leave_if_asked()
        if round_index is None:
            self._engine.forget_load()
        for group in own:
            group.prompt = replace(group.prompt, row=None)  # rows are for judging only: checkpoints do without them
            for sample in group.samples if round_index is not None else ():
                sample.response_text = ""  # its tokens say the same
        return own

    def stream(self, order: StreamOrder) -> tuple[int, list[Carried]]:
        """Generate and judge one response for each ticket that this rank takes, until no more are wanted.

        Collective over all ranks.

        Returns:
            Tokens of this rank's responses that were begun in vain, and what was kept, by key.

        Raises:
            ValueError: if the ledger is damaged.
            OtherRankError: if generation failed on another rank.
        """
        self.leave_if_asked()
        with self._generation(order.step):
            self._stream = self._stream_of(order)
            if self._stream is not None:
                run_to_end(self._stream.run())
                self._ledger.secure()
        self.leave_if_asked()
        return _outcome(self._stream)

    def begin_stream(self, order: StreamOrder) -> None:
        """Begin what `stream` does in a thread of its own; `finish_stream` waits for it. Collective over all ranks.

        Raises:
            ValueError: if the ledger is damaged.
        """
        self.leave_if_asked()
        assert self._in_background is None, "one stream at a time"
        with ExitStack() as stack:
            stack.enter_context(self._generation(order.step))
            self._stream = self._stream_of(order)
            running = None if self._stream is None else InBackground(self._stream.run(), "rollouts")
            self._in_background = stack.pop_all(), running

    def begin_with(self, version: int) -> None:
        """From now on a stream in the background begins responses with this version of the weights. Local."""
        if self._stream is not None:
            self._stream.version = version

    def finish_stream(self, while_waiting: Callable[[], None] = lambda: None) -> tuple[int, list[Carried]]:
        """Wait for the stream that was begun, as `stream` does. Collective over all ranks.

        Args:
            while_waiting: called now and then on ranks that generate.
        """
        assert self._in_background is not None, "begin_stream() comes first"
        (stack, running), self._in_background = self._in_background, None
        with stack:
            if running is not None:
                running.result(while_waiting)
                self._ledger.secure()
        self.leave_if_asked()
        return _outcome(self._stream)

    def close(self) -> None:
        """End a stream in the background that nobody waits for any more. Not collective: the run has ended."""
        if self._in_background is not None:
            (stack, running), self._in_background = self._in_background, None
            self.abort()
            try:
                if running is not None:
                    running.result(self.abort)
            finally:  # the other ranks end as well, or hear that this one does
                ended = RuntimeError("the run ends on this rank")
                stack.__exit__(RuntimeError, ended, None)

    def _generation(self, step: int) -> Work:
        return Work(self._ranks.world, f"generation in step {step}", on_failure_elsewhere=self.abort)

    def _stream_of(self, order: StreamOrder) -> Stream | None:
        """This rank's part of a stream; None where it generates nothing."""
        if self._environment is None:
            return None
        ledger, is_repeatable = self._ledger, self._engine.repeatable
        ledger.begin(order.step)
        return Stream(
            self._engine,
            self._environment,
            order.work,
            sampling=order.sampling,
            run_seed=self._run_seed,
            step=order.step,
            key_of=order.key_of,
            # A repeatable engine would round the missing responses differently beside other ones.
            recorded=(lambda prompt, key: None) if is_repeatable else partial(ledger.found, order.step, 0),
            on_written=ledger.recording(0, lambda sample: None),
            on_judged=order.on_judged,
            look=order.look,
            carried=order.carried,
            version=order.version,
            keeps=order.keeps,
            meets=order.keeps and is_repeatable,
        )

    def abort(self) -> None:
        """End the generation that is under way. Safe in a signal handler."""
        if self._stream is not None:
            self._stream.abort()
        self._engine.abort()

    def recorded(self, step: int, wanted: Iterable[tuple[Prompt, SampleKey]]) -> list[Trajectory | None]:
        """What the ledger has of some responses of a step that was streamed. Local.

        Raises:
            ValueError: if the ledger is damaged.
        """
        if self._environment is None:
            return []
        self._ledger.begin(step)
        return [self._ledger.found(step, 0, prompt, key) for prompt, key in wanted]

    def check_complete(self, step: int, own_missing: int) -> None:
        """Raise if a response that updates were made on is not recorded any more. Collective over all ranks.

        Raises:
            ValueError: on every rank, if any lacks one.
        """
        if num_missing := sum(exchange.all_gather_objects(own_missing, self._ranks.world)):
            raise ValueError(
                f"step {step}: the checkpoint was saved between this step's updates, and {num_missing} of the rollouts "
                "that they train on are not recorded any more. Bring the run's folder rollouts/ back, or delete the "
                "checkpoint to go on from the one before."
            )

    def _finished(
        self, step: int, round_index: int | None, own_prompts: Sequence[Prompt], num_samples: int
    ) -> Mapping[SampleKey, Trajectory]:
        """This rank's trajectories that a run before this one has generated and judged.

        A repeatable engine generates an unfinished share again from the start: in a smaller batch the missing responses
        would be rounded differently.
        """
        if round_index is None or self._environment is None:
            return {}
        finished = self._ledger.finished(step, round_index, own_prompts)
        is_whole = len(finished) == len(own_prompts) * num_samples
        return finished if is_whole or not self._engine.repeatable else {}


def _outcome(stream: Stream | None) -> tuple[int, list[Carried]]:
    return (0, []) if stream is None else (stream.num_unused_tokens, stream.left)


def in_process_engine(config: Config, tokenizer: Any, share: Share | None = ALL_PROMPTS) -> InProcessEngine:
    """The engine of rollout.engine=in_process, on this process's device.

    Args:
        share: this process's share of the prompts; None: it generates nothing.
    """
    return InProcessEngine(
        config.model.path,
        dtype=MODEL_DTYPES[config.model.dtype],
        max_batch_size=config.rollout.max_batch_size,
        device=device(),
        tokenizer=tokenizer,
        share=share,
    )


def share_of(config: Config, ranks: ParallelGroups) -> Share | None:
    """This rank's share of the prompts; None where it generates nothing. Collective over all ranks."""
    if config.rollout.engine == "in_process":
        return Share(ranks.rank, ranks.world.size())
    return share_of_servers(config, ranks)


def build_engine(
    config: Config,
    ranks: ParallelGroups,
    share: Share | None,
    tokenizer: Any,
    folder: Path,
    *,
    may_be_joined: bool = False,
) -> RolloutEngine:
    """The run's rollout engine, not started yet. Collective over all ranks.

    Args:
        share: this rank's, see `share_of`.
        folder: folder for the servers' logs and snapshots.
        may_be_joined: whether servers may join while the engine is in use.

    Raises:
        ValueError: if the model, the devices or the configuration do not fit together.
    """
    if config.rollout.engine == "in_process":
        return in_process_engine(config, tokenizer, share)
    stop_token_ids = find_stop_token_ids(config.model.path, tokenizer)
    return build_server_engine(config, ranks, stop_token_ids, folder, may_be_joined=may_be_joined)
