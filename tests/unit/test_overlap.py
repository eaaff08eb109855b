"""A step that is generated while the one before it trains: by weights of both, as far as it may, and no longer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fipo.config import load_config, num_groups_ahead, num_groups_to_begin
from megatron_fipo.environments.single_turn import SingleTurn
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.rl.trajectory import Prompt, Segment
from megatron_fipo.rollout.batch_source import SourceParts
from megatron_fipo.rollout.engine import GenerationRequest, Share, Turn, sample_seed
from megatron_fipo.rollout.generation import GroupGenerator
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.streaming import StreamingSource
from megatron_fipo.verifiers.verdict import Verdict

PATIENCE_S = 60.0
NUM_GROUPS, NUM_SAMPLES = 4, 2
PAUSE_S = 0.0005


class TickingServers:
    """Servers that write a token for every request now and then, with the weights that they have at that time."""

    repeatable = False
    share = Share(0, 1)
    capacity = 16

    def __init__(self) -> None:
        self.version = -1
        self.in_flight: dict[str, GenerationRequest] = {}
        self.asked: list[tuple[GenerationRequest, int]] = []
        """Requests with the version that there was when they came."""
        self.fails_at = ""
        self.held: set[int] = set()
        """Samples of each prompt of which nothing is written for now."""
        self._num_aborts = 0

    def give(self, policy: Any, version: int) -> None:
        self.version = version

    def take_back(self, policy: Any) -> None: ...

    def close(self) -> None: ...

    def metrics(self) -> Metrics:
        return {}

    async def generate(self, request: GenerationRequest) -> Turn:
        if self.fails_at and request.sample_id.startswith(self.fails_at):
            raise RuntimeError("the servers are gone")
        self.asked.append((request, self.version))
        self.in_flight[request.sample_id] = request
        num_aborts, written = self._num_aborts, []
        length = 3 + (7 * request.group_id + 3 * request.sample_index) % 25 - len(request.prefix)
        while len(written) < length and self._num_aborts == num_aborts:
            await asyncio.sleep(PAUSE_S)
            if request.sample_index not in self.held:
                written.append(self.version)
        del self.in_flight[request.sample_id]
        segments = [
            Segment(torch.full((written.count(version),), 7), "policy", torch.zeros(written.count(version)), version)
            for version in sorted({*written})
        ]
        return Turn(request, segments, "stop" if len(written) == length else "abort")

    def abort(self) -> None:
        self._num_aborts += 1


class Order:
    """Prompts without end."""

    def __init__(self) -> None:
        self.position = 0

    def prompt(self, prompt_id: int) -> Prompt:
        return Prompt(prompt_id, "s", f"q{prompt_id}", (10, prompt_id), "exact", "1")

    def move_to(self, prompt_id: int) -> None:
        self.position = prompt_id

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Any) -> None:
        self.position = state["position"]


class Quiet:
    """Shows nothing."""

    @contextmanager
    def rollout_progress(self, step: int, total: int) -> Iterator[Any]:
        yield SimpleNamespace(advance=lambda count=1: None)

    def warning(self, text: str, kind: str = "") -> None: ...


class Alone:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


class Run:
    """A run's source over such servers."""

    def __init__(self, folder: Path, bound: int = 1) -> None:
        config = load_config(
            None,
            [
                "model.path=x",
                "data.train.s.kind=jsonl",
                "data.train.s.path=x",
                "rollout.engine=sglang",
                "sampling.streaming=true",
                f"rollout.max_staleness_steps={bound}",
                "rollout.overlap=true",
                f"rollout.num_prompts={NUM_GROUPS}",
                f"rollout.num_samples_per_prompt={NUM_SAMPLES}",
                "train.num_minibatches=1",
            ],
        )
        self.servers, self.asks_to_leave = TickingServers(), False
        ranks: Any = SimpleNamespace(world=Alone(), dp=Alone(), rank=0)
        ledger = RolloutLedger(folder, 0, "one", decode=lambda ids: "")

        self.judged: list[int] = []
        environment = SingleTurn(self._judge, lambda ids: "")
        generator = GroupGenerator(self.servers, environment, ranks, 0, ledger, self._leave_if_asked)
        plane = DataPlane(ranks, generates=True)
        parts = SourceParts(config, ranks, Order(), self.servers, generator, plane, ledger, Quiet())  # type: ignore[arg-type]
        self.source, self.generator, self.ledger = StreamingSource(parts), generator, ledger

    async def _judge(self, prompt: Prompt, text: str, reason: str) -> Verdict:
        """One response in two to a prompt is right, and to every third prompt both."""
        self.judged.append(prompt.prompt_id)
        is_second = self.judged.count(prompt.prompt_id) % 2 == 0
        return Verdict(1.0 if is_second or prompt.prompt_id % 3 == 0 else 0.0)

    def _leave_if_asked(self) -> None:
        if self.asks_to_leave:
            raise InterruptedError

    def batch(self, step: int) -> Any:
        return self.source.batch(step)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def segments_of(rollouts: Any) -> list[list[tuple[int | None, int]]]:
    """(version, tokens) of each part of each response of the batch."""
    samples = [rollouts.trajectory(index) for index in range(len(rollouts.plan))]
    return [[(part.policy_version, len(part.token_ids)) for part in sample.segments] for sample in samples]


def prompts_of(rollouts: Any) -> list[int]:
    return sorted({int(prompt_id) for prompt_id in rollouts.plan["prompt_id"]})


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.source.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "rollouts"] == []


def test_a_step_is_generated_while_the_one_before_trains(run: Run) -> None:
    """Its responses begin with the old weights, and those that are not done go on with the new ones."""
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    first = run.batch(0)
    assert {version for parts in segments_of(first) for version, _ in parts} == {0}
    num_judged = len(run.judged)
    servers.held = {1}
    source.begin(1)
    until(lambda: len(run.judged) >= num_judged + NUM_SAMPLES)  # in training
    assert servers.in_flight
    source.give(None, 1)  # type: ignore[arg-type]
    servers.held = set()
    second = run.batch(1)
    versions = [sorted({version for version, _ in parts}) for parts in segments_of(second)]
    assert [0] in versions
    assert {version for parts in versions for version in parts} <= {0, 1}
    assert servers.in_flight == {}
    assert min(prompts_of(second)) > max(prompts_of(first))
    assert source.metrics()["rollout/staleness_steps/max"].value() == 1


def test_many_steps_use_every_prompt_once_and_in_order_and_no_token_is_too_stale(run: Run) -> None:
    source, servers = run.source, run.servers
    used: list[int] = []
    went_on = 0
    for step in range(8):
        source.give(None, step)  # type: ignore[arg-type]
        rollouts = run.batch(step)
        assert len(rollouts.group_sizes) == NUM_GROUPS
        for parts in segments_of(rollouts):
            assert all(step - 1 <= version <= step for version, _ in parts if version is not None)
            went_on += len(parts) > 1
        used += prompts_of(rollouts)
        if step < 7:
            before = len(servers.asked)
            source.begin(step + 1)
            opened = source._open
            assert opened is not None
            assert opened.books is not None
            until(lambda before=before, books=opened.books: len(servers.asked) > before or books.is_over)  # type: ignore[misc]
    assert used == sorted({*used})
    assert went_on, "some were written by both"


def test_what_is_begun_with_old_weights_leaves_room_for_their_age(run: Run) -> None:
    """With a bound of 1: no more than the step itself needs, until its own weights are there."""
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    share = source._kept_share.share()
    source.begin(1)
    opened = source._open
    assert opened is not None
    assert opened.books is not None
    needed = num_groups_to_begin(NUM_GROUPS, share)
    until(lambda: opened.books.is_over)  # type: ignore[union-attr]
    until(lambda: not servers.in_flight)
    assert not opened.work.is_over, "nobody has asked for it yet"
    begun = {request.group_id for request, version in servers.asked if version == 0}
    assert max(begun) < source.parts.prompts.position + max(opened.books.num_to_begin, needed)
    source.give(None, 1)  # type: ignore[arg-type]
    run.batch(1)
    assert opened.books.num_to_begin > needed
    assert {version for request, version in servers.asked if request.group_id > max(begun)} <= {1}


def test_a_carried_response_remembers_the_weights_that_began_it(run: Run) -> None:
    source = run.source
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    source.begin(1)
    source.give(None, 1)  # type: ignore[arg-type]
    run.batch(1)
    for prompt, one in source._carry_over.unfinished(run.source.parts.prompts.prompt):
        versions = [part.policy_version for part in one.response.segments]
        assert one.begun_at_step <= min(version for version in versions if version is not None), prompt


def test_prompts_are_begun_one_step_less_ahead_until_the_weights_are_there(tmp_path: Path) -> None:
    run = Run(tmp_path, bound=2)
    try:
        run.source.give(None, 0)  # type: ignore[arg-type]
        run.batch(0)
        share = run.source._kept_share.share()
        run.servers.held = {0, 1}
        run.source.begin(1)
        opened = run.source._open
        assert opened is not None
        assert opened.books is not None
        before, after = (num_groups_ahead(NUM_GROUPS, share, num_steps) for num_steps in (1, 2))
        needed = num_groups_to_begin(NUM_GROUPS, share)
        assert opened.books.num_to_begin == max(needed, before) < after
        run.servers.held = set()
        run.source.give(None, 1)  # type: ignore[arg-type]
        run.batch(1)
        assert opened.books.num_to_begin >= after
    finally:
        run.source.close()


def test_the_weights_that_begin_a_response_are_part_of_its_seed(run: Run) -> None:
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    servers.held = {0, 1}  # so that nothing is asked for while weights come
    source.begin(1)
    opened = source._open
    assert opened is not None
    num_begun = min(servers.capacity, len(opened.order.carried) + opened.work._num_tickets)
    until(lambda: len(servers.in_flight) == num_begun)
    source.give(None, 1)  # type: ignore[arg-type]
    servers.held = set()
    run.batch(1)
    fresh = [(one, version) for one, version in servers.asked if one.sample_id.startswith("1/") and not one.prefix]
    assert {version for _, version in fresh} == {0, 1}
    for one, version in fresh:
        assert one.seed == sample_seed(0, version, one.group_id, one.sample_index)


def test_what_a_killed_run_has_judged_is_not_asked_for_again(tmp_path: Path) -> None:
    """Wherever in the order of prompts it is: the run that goes on may begin fewer."""
    killed = Run(tmp_path)
    killed.source.give(None, 0)  # type: ignore[arg-type]
    killed.batch(0)
    state = killed.source.state().gathered()
    first = killed.source.next_prompt
    killed.source.give(None, 1)  # type: ignore[arg-type]
    killed.batch(1)
    killed.source.close()
    recorded = {
        (one.key.prompt_id, one.key.sample_index): min(version for version, _, _ in one.policy_versions)
        for one in killed.ledger.shared_out(1, 0, 1)
    }
    (tmp_path / "step_000001" / "plan.json").unlink()  # as if it had been killed before that

    run = Run(tmp_path)
    state["sampler"]["kept_share"] = [1000.0, 1000.0]
    run.source.load_state_dict(state)
    run.source.give(None, 1)  # type: ignore[arg-type]
    run.batch(1)
    num_begun = num_groups_ahead(NUM_GROUPS, 1.0, 1)
    assert max(prompt for prompt, _ in recorded) >= first + num_begun, "the killed run has come further"
    assert not any((one.group_id, one.sample_index) in recorded for one, _ in run.servers.asked)
    run.source.give(None, 2)  # type: ignore[arg-type]
    run.batch(2)
    for one, _ in run.servers.asked:
        begun_at = recorded.get((one.group_id, one.sample_index))
        assert begun_at is None or begun_at < 2 - 1, "only what is too stale is begun anew"
    run.source.close()


def test_a_step_that_is_not_asked_for_is_stopped(run: Run) -> None:
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    servers.held = {0, 1}
    source.begin(1)
    until(lambda: servers.in_flight)
    source.stop()
    assert servers.in_flight == {}
    source.stop()


def test_a_failure_in_the_background_is_raised_where_the_step_is_asked_for(run: Run) -> None:
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    servers.fails_at = "1/"
    source.begin(1)
    with pytest.raises(RuntimeError, match="the servers are gone"):
        run.batch(1)


def test_a_signal_ends_what_runs_in_the_background(run: Run) -> None:
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    servers.held = {0, 1}
    source.begin(1)
    until(lambda: servers.in_flight)
    run.asks_to_leave = True
    run.generator.abort()  # as a signal's handler does
    with pytest.raises(InterruptedError):
        run.batch(1)
    assert servers.in_flight == {}


def test_a_run_that_ends_in_training_leaves_no_thread(run: Run) -> None:
    source, servers = run.source, run.servers
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    servers.held = {0, 1}
    source.begin(1)
    until(lambda: servers.in_flight)
    source.close()
    assert servers.in_flight == {}


def test_the_state_is_that_before_the_step_that_runs(run: Run) -> None:
    source = run.source
    source.give(None, 0)  # type: ignore[arg-type]
    run.batch(0)
    before = source.state().gathered()
    run.servers.held = {0, 1}
    source.begin(1)
    until(lambda: run.servers.in_flight)
    assert source.state().gathered() == before
