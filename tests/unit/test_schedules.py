"""The simulation of schedules: cases worked out by hand, laws of conservation, and controls that must fail."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo import cli
from megatron_fipo.config import Config, load_config
from megatron_fipo.preflight.schedules import colocated, dedicated, rounds
from megatron_fipo.preflight.schedules.books import Books
from megatron_fipo.preflight.schedules.calibration import read_run
from megatron_fipo.preflight.schedules.cluster import Cluster
from megatron_fipo.preflight.schedules.colocated import simulate_colocated
from megatron_fipo.preflight.schedules.comparison import (
    ScheduleAssumptions,
    colocated_setup,
    compare,
    fill_of,
    run_carry_over,
    run_stream,
    workload_of,
)
from megatron_fipo.preflight.schedules.decoding import Decoding
from megatron_fipo.preflight.schedules.dedicated import DedicatedBooks, simulate_dedicated
from megatron_fipo.preflight.schedules.outcome import Setup, Step, summary
from megatron_fipo.preflight.schedules.rounds import RoundBooks, simulate_rounds
from megatron_fipo.preflight.schedules.server import Group, Response, Server, make_group
from megatron_fipo.preflight.schedules.workload import Lengths, Workload
from megatron_fipo.preflight.tables import Options, plan_of

ROOT = Path(__file__).parents[2]
ONE_SECOND = Decoding(fixed=1.0, weights=0, cached_token=0, response=0, prefilled_token=0, pool=10**9, slots=1)
"""A server that writes one token a second, of one response at a time."""

RANDOM = Lengths(mean=2000, longest=6000, prompt=20, between=0.7, within=0.5)
REAL = Decoding(fixed=1e-3, weights=5e-3, cached_token=1e-7, response=1e-4, prefilled_token=1e-5, pool=30_000, slots=24)
"""Small enough a cache that it overflows."""


class Given(Workload):
    """Prompts of one response each, with lengths and verdicts as the test says; then long ones of no use."""

    def __init__(self, *prompts: tuple[int, bool]) -> None:
        super().__init__(Lengths(mean=5, longest=100, prompt=0), samples=2, kept=0.49)
        self._prompts = prompts

    def group(self, prompt: int) -> tuple[list[int], bool]:
        length, mixed = self._prompts[prompt] if prompt < len(self._prompts) else (50, False)
        return [length], mixed


def setup_of(decoding: Decoding = ONE_SECOND, num_servers: int = 2, batch: int = 1, **changes: Any) -> Setup:
    plain = Setup(
        decoding=decoding,
        num_servers=num_servers,
        server_gpus=1,
        gpus=num_servers,
        training_gpus=num_servers,
        batch=batch,
        training_seconds=lambda lengths: 10.0,
        handover=2.0,
        claims=decoding.slots,
    )
    return replace(plain, **changes)


@pytest.mark.parametrize("running", [1, 3, 20])
@pytest.mark.parametrize("response", [0.0, 1e-4, 1.0])
def test_time_of_steps_is_the_sum_of_each(running: int, response: float) -> None:
    """Also where arithmetic takes longer than reading at first, and no longer does later."""
    decoding = Decoding(2e-3, 1e-3, 1e-6, response, 0.0, 10**6, 64)
    for cached, steps in itertools.product((0, 700), (1, 2, 57, 400)):
        each = [2e-3 + max(1e-3 + 1e-6 * (cached + running * step), response * running) for step in range(steps)]
        assert decoding.seconds(running, cached, steps) == pytest.approx(sum(each), rel=1e-12)
        middle = sum(each[:-1]) + each[-1] / 2
        assert decoding.steps_until(running, cached, middle) == steps


def test_rounds_by_hand() -> None:
    """Lengths 5, 2, 4. Spread: the second server is free after 2 s and takes the third prompt: 6 s, 11 of 12 busy.
    In shares node 0 has prompts 0 and 2: 9 s. A step takes 10 s of training and 2 s of hand-over besides."""
    workload = Given((5, True), (2, True), (4, True))
    for spread, generation in ((True, 6), (False, 9)):
        (step,) = simulate_rounds(setup_of(batch=2), workload, per_round=3, spread=spread, steps=1)
        assert (step.generation, step.seconds, step.busy) == (generation, generation + 12, 11)
        assert (step.tokens.trained, step.tokens.dropped, step.tokens.wasted) == (7, 0, 4)
        outcome = summary("x", setup_of(batch=2), [step])
        assert outcome.without_work == pytest.approx(1 - (11 + 2 * 10) / (2 * (generation + 12)))


def test_another_round_where_the_batch_is_not_full() -> None:
    """The first prompt alone is generated (3 s), then twice the missing one (4 s and 6 s): 9 s, and 4 tokens train."""
    workload = Given((3, False), (4, True), (6, True))
    (step,) = simulate_rounds(setup_of(), workload, per_round=None, spread=True, steps=1)
    assert step.generation == 9
    assert (step.tokens.trained, step.tokens.dropped, step.tokens.wasted) == (4, 3, 6)


MANY = ((5, False), (3, False), (4, True), (9, True), (3, True))
"""Server 0 has prompts 0 (till 5 s) and 3, server 1 has prompts 1 (till 3 s) and 2 (till 7 s)."""


def test_streaming_by_hand() -> None:
    """At 7 s prompt 2 is the first mixed one, and those before it are judged; of prompt 3 two tokens are thrown away.
    The next step begins with prompt 3 again, from its first token: 9 s; prompt 4 is through by then and is surplus."""
    first, second = simulate_colocated(setup_of(), Books(Given(*MANY), 1), steps=2)
    assert (first.generation, first.generated) == (7, 14)
    assert (first.tokens.trained, first.tokens.dropped, first.tokens.wasted) == (4, 8, 2)
    assert (second.generation, second.tokens.trained, second.staleness) == (9, 9, {0: 9})


def test_carry_over_by_hand() -> None:
    """The two tokens of prompt 3 are kept, and prompt 4 has not begun. The second step waits for the other seven of
    prompt 3, in whose time prompt 4 ends; the third step finds it there, and generates nothing that it needs."""
    first, second, third = simulate_colocated(setup_of(), Books(Given(*MANY), 1, bound=1), steps=3)
    assert (first.generation, first.tokens.wasted) == (7, 0)
    assert (second.generation, second.tokens.trained, second.staleness) == (7, 9, {1: 2, 0: 7})
    assert (third.generation, third.tokens.trained, third.staleness) == (0, 3, {1: 3})


@pytest.mark.parametrize(
    ("length", "drops", "generation", "staleness", "wasted"),
    [
        (20, True, 20, {0: 20}, 7),
        (20, False, 13, {2: 5, 1: 2, 0: 13}, 0),
        (6, True, 6, {0: 6}, 6),
        (6, False, 0, {2: 5, 1: 1}, 0),
    ],
)
def test_what_is_too_old_is_begun_anew_or_goes_on(
    length: int, drops: bool, generation: int, staleness: dict[int, int], wasted: int
) -> None:
    """Steps of one prompt each, and three servers: the third one writes five tokens of prompt 2 in the first step, and
    one or two in the second, which takes 2 s. For the third step the five are too old by one, finished or not."""
    workload = Given((5, True), (7, True), (length, True))
    _, second, third = simulate_colocated(setup_of(num_servers=3), Books(workload, 1, 1, drops=drops), steps=3)
    assert (second.generation, second.staleness, second.tokens.wasted) == (2, {1: 5, 0: 2}, wasted)
    assert (third.generation, third.staleness) == (generation, staleness)


def test_what_carry_over_starts() -> None:
    """A batch of 8, half of the groups kept. On-policy 16 and two standard deviations of sqrt(8 / 2) / (1 / 2) = 4;
    with a bound of 2 the 24 of three steps need 48, less two of sqrt(24 / 2) / (1 / 2) = 6.9: 34."""
    workload = Workload(RANDOM, samples=4, kept=0.5)
    for bound, expected in ((0, 24), (1, 24), (2, 34)):
        books = Books(workload, 8, bound)
        while books.may_start:
            books.start()
        assert books.next_prompt == expected


@pytest.mark.parametrize(("adapts", "started"), [(True, [5, 1, 1, 1, 1, 1]), (False, [5, 0, 0, 0, 0, 5])])
def test_what_a_stream_starts(adapts: bool, started: list[int]) -> None:
    """A batch of one, kept in a share of 0.49: (1 + 2 sqrt(0.51)) / 0.49 = 4.96. None is mixed: for each that is judged
    another one is started, or all that are needed once nothing is in flight."""
    books = Books(Given(*[(1, False)] * 20), 1, adapts=adapts)
    in_flight: list[Group] = []
    counts = []
    for judged in range(6):
        if judged:
            books.finish(in_flight.pop(0).responses[0])
        before = len(in_flight)
        while books.may_start:
            in_flight.append(books.start())
        counts.append(len(in_flight) - before)
    assert counts == started


def test_dedicated_servers_by_hand() -> None:
    """One server. Prompts of 4 and 25 tokens: the trainer starts at 4 s and ends at 14 s; the server then stands still
    for 2 s, and ends at 31 s: ten tokens are of version 0, fifteen of version 1, on which they are trained."""
    workload = Given((4, True), (25, True))
    one = setup_of(num_servers=1, gpus=2, training_gpus=1)
    first, second = simulate_dedicated(one, DedicatedBooks(workload, 1, bound=1), steps=2, keeps_cache=True)
    assert (first.seconds, second.seconds) == (4 + 10 + 2, 31 + 10 + 2 - 16)
    assert second.staleness == {1: 10, 0: 15}


def test_a_trainer_waits_until_its_weights_are_over() -> None:
    """The second batch is there after 10 s, the first is trained on until 14 s, its weights are over after 16 s."""
    one = setup_of(num_servers=1, gpus=2, training_gpus=1)
    books = DedicatedBooks(Given((4, True), (6, True)), 1, bound=1)
    first, second = simulate_dedicated(one, books, steps=2, keeps_cache=True)
    assert (first.seconds, second.seconds) == (16, 10 + 2)
    assert second.staleness == {1: 6}


def test_how_many_prompts_dedicated_servers_start() -> None:
    """With a bound of 1 two batches of 3, half of the groups kept: 12 in flight. Three of them turn out to be
    mixed, so that six more are started. What the trainer has counts until its weights are there."""
    workload = Workload(RANDOM, samples=4, kept=0.5)
    books = DedicatedBooks(workload, 3, bound=1)

    def start_all() -> list[Group]:
        groups = []
        while books.may_start:
            groups.append(books.start())
        return groups

    groups = start_all()
    assert len(groups) == 12
    for group in groups:
        for response in group.responses:
            books.finish(response)
    assert books.num_ready == sum(group.mixed for group in groups) == 3
    assert len(start_all()) == 6
    books.close()
    assert not books.may_start
    books.next_version()
    assert len(start_all()) == 6


def test_a_full_cache_puts_out_who_came_last() -> None:
    """Room for 6,000 tokens, two responses of 10 + 3,000. After 2,990 steps it is full; the second waits for ten, and
    its 3,000 tokens are computed anew (3 s, as the 20 of the prompts take 0.02 s) before its last ten steps. A third,
    of 100, has waited from the start, and still comes after it."""
    server = Server(replace(ONE_SECOND, slots=8, pool=6000, prefilled_token=0.001), 0, 10, 3000, claims=8)
    group = make_group(0, [3000, 3000, 100], True, 0)
    server.waiting.extend(group.responses)
    server.admit()
    done = []
    while server.running:
        done += server.finish()
        server.admit()
    assert done == group.responses
    assert (server.clock, server.retracted, server.tokens) == (pytest.approx(3013.02 + 100.01), 1, 6100)
    assert [response.made for response in done] == [3000, 3000, 100]


def test_what_is_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"may take 6,020 tokens, and a server has room for 6,000"):
        Cluster(replace(REAL, pool=6000), 1, RANDOM, 8)


def test_prompts_are_as_they_are_assumed() -> None:
    workload = Workload(Lengths(mean=10_000, longest=20_480, prompt=200), samples=16, kept=0.35)
    groups = [workload.group(prompt) for prompt in range(8192)]
    lengths = np.array([group for group, _ in groups])
    assert lengths.mean() == pytest.approx(10_000, rel=0.02)
    assert lengths.max() == 20_480
    assert 0.05 < (lengths == 20_480).mean() < 0.2
    assert np.mean([mixed for _, mixed in groups]) == pytest.approx(0.35, abs=0.02)
    assert all(mixed for _, mixed in (Workload(RANDOM, 1).group(prompt) for prompt in range(9)))
    with pytest.raises(ValueError, match=r"of groups of 2 responses at most 0\.5 can be mixed"):
        Workload(RANDOM, samples=2, kept=0.5)


def too_many_begun(lengths: Lengths = RANDOM, seed: int = 0) -> Workload:
    """Half of the groups are kept, and schedules take it to be a quarter: they begin too many ahead."""
    workload = Workload(lengths, samples=4, kept=0.5, seed=seed)
    workload.kept = 0.25
    return workload


def schedules(seed: int, make: type[Books] = Books) -> list[tuple[str, Books, Any]]:
    """(name, books, function that runs it) of every schedule, on servers whose caches overflow.

    Args:
        make: books of the colocated ones.
    """
    workload, setup = Workload(RANDOM, samples=4, kept=0.5, seed=seed), setup_of(REAL, 3, batch=12)
    found: list[tuple[str, Books, Any]] = []
    for bound, drops in ((0, True), (1, True), (1, False), (4, True)):
        books = make(too_many_begun(seed=seed) if bound else workload, 12, bound, drops=drops)
        used = replace(setup, num_servers=30) if bound else setup
        run = lambda books=books, used=used: simulate_colocated(used, books, steps=6)  # noqa: E731
        found.append((f"colocated {bound} {drops}", books, run))
    for bound, keeps in ((1, False), (1, True), (3, False)):
        apart = DedicatedBooks(workload, 12, bound)
        run = lambda books=apart, keeps=keeps: simulate_dedicated(  # noqa: E731
            setup, books, steps=6, keeps_cache=keeps
        )
        found.append((f"dedicated {bound} {keeps}", apart, run))
    return found


def check_conservation(monkeypatch: pytest.MonkeyPatch, make: type[Books] = Books) -> None:
    """Every token that servers wrote is trained, dropped, wasted or still in the books, in every schedule."""
    clusters: list[Cluster] = []

    class Watched(Cluster):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            clusters.append(self)

    for module in (colocated, dedicated):
        monkeypatch.setattr(module, "Cluster", Watched)
    for name, books, run in schedules(3, make):
        run()
        cluster = clusters[-1]
        cluster.abort()
        tokens = books.tokens
        known = tokens.trained + tokens.dropped + tokens.wasted + books.carried_tokens
        assert cluster.tokens == known, name
        assert min(tokens.trained, tokens.dropped) > 0, name
        assert (tokens.wasted > 0) == (name.startswith("colocated") and name.endswith("True")), name
    assert any(server.retracted for cluster in clusters for server in cluster.servers)


def test_every_token_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    check_conservation(monkeypatch)


def test_a_lost_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: books that forget what they throw away."""

    class Forgetful(Books):
        def _begin_anew(self, response: Response) -> None:
            self.tokens.wasted -= response.made
            super()._begin_anew(response)

    with pytest.raises(AssertionError, match="colocated 0"):
        check_conservation(monkeypatch, Forgetful)


def test_rounds_account_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a surplus that is kept for a step is wasted less."""
    workload = Workload(RANDOM, samples=4, kept=0.5)
    kept: list[Books] = []
    monkeypatch.setattr(rounds, "RoundBooks", lambda *a, **k: kept.append(RoundBooks(*a, **k)) or kept[-1])
    setup = setup_of(REAL, 4, batch=12, servers_per_node=2)
    for spread in (False, True):
        wasted = []
        for age in (0, 1):
            steps = simulate_rounds(setup, workload, per_round=36, spread=spread, surplus_age=age, steps=5)
            tokens = kept[-1].tokens
            known = tokens.trained + tokens.dropped + tokens.wasted + kept[-1].carried_tokens
            assert known == sum(step.generated for step in steps)
            wasted.append(tokens.wasted)
        assert wasted[0] > 2 * wasted[1]


def batches(books: Books, num_servers: int, steps: int = 4) -> list[list[Group]]:
    taken: list[list[Group]] = []
    close = books.close

    def watched() -> list[Group]:
        taken.append(close())
        return taken[-1]

    books.close = watched  # type: ignore[method-assign]
    simulate_colocated(setup_of(REAL, num_servers, batch=books.batch), books, steps=steps)
    return taken


def first_mixed(workload: Workload, number: int) -> list[int]:
    return list(itertools.islice((prompt for prompt in itertools.count() if workload.group(prompt)[1]), number))


def prompts_of(taken: Sequence[Sequence[Group]]) -> list[list[int]]:
    return [[group.prompt for group in groups] for groups in taken]


@pytest.mark.parametrize("num_servers", [1, 2, 7, 30])
@pytest.mark.parametrize("bound", [0, 1, 2])
def test_streaming_takes_the_first_mixed_groups_for_any_number_of_servers(bound: int, num_servers: int) -> None:
    workload = Workload(RANDOM, samples=4, kept=0.5)
    taken = prompts_of(batches(Books(workload, 12, bound), num_servers))
    assert list(itertools.chain(*taken)) == first_mixed(workload, 48)


def test_who_is_finished_first_teaches_brevity() -> None:
    """Control: with the groups that are finished first, batches depend on the servers and responses are shorter."""

    class Naive(Books):
        def _file(self, group: Group) -> None:
            self._ready.append(group.prompt)

        is_full = property(lambda self: len(self._ready) >= self.batch)  # type: ignore[assignment]

    workload = Workload(RANDOM, samples=4, kept=0.5)
    naive, fewer = (batches(Naive(workload, 12), num_servers, steps=1) for num_servers in (30, 7))
    assert prompts_of(naive) != prompts_of(fewer)
    fair = batches(Books(workload, 12), 30, steps=1)
    mean = {
        name: np.mean([response.made for response in itertools.chain(*(group.responses for group in taken[0]))])
        for name, taken in (("naive", naive), ("fair", fair))
    }
    assert mean["naive"] < 0.95 * mean["fair"]


def test_no_token_is_staler_than_the_bound() -> None:
    """And some are where what is too old is not begun anew."""
    workload = too_many_begun()
    for bound, drops in itertools.product((0, 1, 2), (True, False)):
        steps = simulate_colocated(setup_of(REAL, 30, batch=12), Books(workload, 12, bound, drops=drops), steps=8)
        stalest = max(max(step.staleness) for step in steps)
        wasted = sum(step.tokens.wasted for step in steps)
        assert (stalest <= bound, wasted > 0) == ((True, True) if drops else (False, False)), (bound, stalest)


def test_the_seed_alone_decides() -> None:
    def results(seed: int) -> list[list[Step]]:
        return [run() for _, _, run in schedules(seed)]

    assert results(5) == results(5)
    assert results(5) != results(6)


def scale_setup(num_gpus: int = 128) -> tuple[Setup, Workload]:
    """Qwen2.5-32B on H100 with the assumptions of an earlier, independent simulation, whose results are below."""
    workload = Workload(Lengths(10_000, 20_480, 200), samples=16, kept=0.5)
    read, product = 0.6 * 3.35e12, 2 * 32.76e9 / (4 * 0.5 * 989e12)
    decoding = Decoding(3e-3, 16.38e9 / read, 65536 / read, product, product, int(48.4 * 2**30 / 65536), 256)

    def training(lengths: Sequence[int]) -> float:
        tokens = np.asarray(lengths, dtype=float) + 200
        attention = 2 * 64 * 40 * 128 * tokens * tokens
        forward = 2 * (32.76e9 - 152064 * 5120) * tokens + attention
        recomputed = 2 * 152064 * 5120 * tokens + attention
        return float((4 * forward + recomputed).sum()) / (num_gpus * 989e12 * 0.35) + 0.6 * 8 + 5

    setup = Setup(decoding, num_gpus // 4, 4, num_gpus, num_gpus, 512, training, 30.0, 119, 2)
    return setup, workload


def test_the_32b_recipe_comes_to_what_another_simulation_found() -> None:
    """4,596 s a step today, 2,471 s in a stream, 2,278 s with carry-over. That took groups as they were finished, at a
    mean staleness of 0.28; in the order of prompts they wait for those before them, and are a fifth staler."""
    setup, workload = scale_setup()
    today = summary("", setup, simulate_rounds(setup, workload, per_round=2048, spread=False, steps=1))
    streaming = summary("", setup, simulate_colocated(setup, Books(workload, 512), steps=2))
    carried = summary("", setup, simulate_colocated(setup, Books(workload, 512, 1), steps=5)[2:])
    assert today.seconds == pytest.approx(4596, rel=0.03)
    assert streaming.seconds == pytest.approx(2471, rel=0.07)
    assert carried.seconds == pytest.approx(2278, rel=0.02)
    assert carried.staleness == pytest.approx(1.2 * 0.28, abs=0.03)
    assert setup.num_servers * setup.decoding.saturated(workload.context) / 16384 == pytest.approx(0.22, abs=0.02)


SMALL = [
    *("preflight", str(ROOT / "examples/qwen2_5_32b/fipo.yaml"), "--world-size", "32", "--sizes-only"),
    *("--model-config", str(ROOT / "examples/qwen2_5_32b/model_config.json")),
    *("rollout.num_prompts=32", "rollout.num_prompts_per_round=128", "train.num_minibatches=4"),
]


def test_the_command_prints_the_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--schedules"]) == 0
    text = capsys.readouterr().out
    for row in ("rounds", "rounds, spread", "streaming", "carry-over 1", "dedicated 1", "ideal"):
        assert f"│ {row} " in text
    assert "Dedicated: 16 GPUs generate and 16 train" in text
    assert "To keep all servers full, tokens must be" in text
    assert cli.main(SMALL) == 0
    assert "Schedules" not in capsys.readouterr().out


def test_the_command_refuses_a_share_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--schedules", "rollout.num_samples_per_prompt=2"]) == 2
    assert "of groups of 2 responses at most 0.5 can be mixed" in capsys.readouterr().err


RECIPE = ROOT / "examples/qwen2_5_32b"


def recipe() -> tuple[Config, Options]:
    """The recipe on the GPUs that it is for."""
    options = Options(128, 8, model_config=str(RECIPE / "model_config.json"), check_files=False)
    return load_config(RECIPE / "fipo.yaml"), options


def test_how_stale_fills_the_servers() -> None:
    """32 servers; 8,192 responses over the kept half. More servers, or more groups kept, and it grows by as much."""
    config, options = recipe()
    fill = fill_of(plan_of(config, options), ScheduleAssumptions())
    assert (fill.servers, fill.needed) == (32, 16_384)
    assert fill.steps == 32 * fill.each / 16_384
    assert fill.steps == pytest.approx(0.2, abs=0.03), "0.22 by another simulation, with room for 2 % more tokens"
    more = fill_of(plan_of(config, replace(options, world_size=1024)), ScheduleAssumptions())
    assert more.steps == pytest.approx(8 * fill.steps)
    assert fill.longest == 2, "20,480 over 10,240"
    assert (fill.bound, more.bound) == (1, 4), "0.39 steps of the longest response, and 3.1"
    easier = replace(options, assumptions=replace(options.assumptions, kept_share=0.75))
    assert fill_of(plan_of(config, easier), ScheduleAssumptions()).needed == pytest.approx(8192 / 0.75)


@pytest.mark.parametrize(("gpus", "bound"), [(16, 1), (32, 2)])
def test_the_bound_that_fills_the_servers_is_the_least(gpus: int, bound: int) -> None:
    """Steps of 32 prompts: one less takes a tenth longer at least, two more gain next to nothing."""
    config, options = recipe()
    few = replace(config.rollout, num_prompts=32)
    config = replace(config, rollout=few, train=replace(config.train, num_minibatches=4))
    plan, assumptions = plan_of(config, replace(options, world_size=gpus)), ScheduleAssumptions()
    workload = workload_of(plan, assumptions)
    setup = colocated_setup(plan, workload, assumptions)
    assert fill_of(plan, assumptions).bound == bound

    def generation(of: int) -> float:
        steps = run_carry_over(plan, workload, setup, of) if of else run_stream(plan, workload, setup)
        return sum(step.generation for step in steps) / len(steps)

    assert generation(bound - 1) > 1.1 * generation(bound)
    assert generation(bound) < 1.04 * generation(bound + 2)


def test_every_plan_says_how_stale_fills_the_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(SMALL) == 0
    assert re.search(
        r"how stale tokens must be to fill the servers .* 0\.\d\d steps: these, of 1,024", capsys.readouterr().out
    )
    carried = ("sampling.streaming=true", "rollout.max_staleness_steps")
    for own, row in ((0, " 2, 0 "), (2, " 2, 2 "), (3, " 2, 3, which gains nothing more ")):
        assert cli.main([*SMALL, carried[0], f"{carried[1]}={own}"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "that fills them, yours" in line)
        assert row in line
    assert cli.main([*SMALL, "rollout.num_samples_per_prompt=2"]) == 0
    assert "not known: kept=0.5: of groups of 2 responses" in capsys.readouterr().out


def metrics_of(generation: float, training: float, **changes: float) -> dict[str, float]:
    return {
        "rollout/response_tokens/mean": 6000.0,
        "rollout/response_tokens/p25": 3000.0,
        "rollout/response_tokens/p75": 8000.0,
        "rollout/dropped_groups/all_right_share": 0.2,
        "rollout/dropped_groups/all_wrong_share": 0.15,
        "rollout/dropped_groups/failed_share": 0.05,
        "time_s/rollout": generation,
        "time_s/old_log_probs": training / 4,
        "time_s/update": 3 * training / 4,
        **changes,
    }


def test_a_run_calibrates_the_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own schedule then takes what it took. The mean of 700 and 900 s is 800; early steps do not count."""
    early = [metrics_of(5.0, 5.0)] * 3
    late = [metrics_of(700.0, 90.0)] * 10 + [metrics_of(900.0, 110.0)] * 10
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*early, *late, {"step": 9}]))
    measured = read_run(str(tmp_path))
    assert (measured.response_tokens, measured.kept_share) == (6000, pytest.approx(0.6))
    assert measured.spread == pytest.approx(np.log(8 / 3) / 1.349, rel=1e-3)
    assert cli.main([*SMALL, "--calibrate", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "rounds")[:4] == ["930", "1.00x", "800", "100"]  # 30 s of hand-over
    assert "responses of 6,000 tokens on average" in text
    assert "60% of groups kept" in text
    assert "Calibrated: generation takes" in text


def row_of(text: str, schedule: str) -> list[str]:
    """Cells of a row of the table of schedules."""
    row = next(line for line in text.splitlines() if line.startswith(f"│ {schedule}  "))
    return [cell.strip() for cell in row.split("│")[2:-1]]


def test_a_run_that_streams_calibrates_its_own_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics_of(800.0, 100.0)) + "\n")
    assert cli.main([*SMALL, "--calibrate", str(tmp_path), "sampling.streaming=true"]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "streaming")[2] == "800"
    assert row_of(text, "rounds")[2] != "800"


def test_a_run_with_carry_over_calibrates_its_own_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics_of(800.0, 100.0)) + "\n")
    own = ["sampling.streaming=true", "rollout.max_staleness_steps=3"]
    assert cli.main([*SMALL, "--calibrate", str(tmp_path), *own]) == 0
    text = capsys.readouterr().out
    assert row_of(text, "carry-over 3")[2] == "800"
    assert row_of(text, "streaming")[2] != "800"
    assert "prompts used on average, begun ahead at most" in text
    assert cli.main([*SMALL, "--calibrate", str(tmp_path)]) == 0
    assert "carry-over 3" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("{}\n", "has no step with lengths and times"),
        (json.dumps(metrics_of(1, 1) | {"rollout/response_tokens/p25": None}), "no number rollout/response_tokens/p25"),
        (json.dumps(metrics_of(1, 1) | {"rollout/dropped_groups/all_right_share": 0.8}), "nothing to simulate"),
    ],
)
def test_a_run_that_cannot_calibrate(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert cli.main([*SMALL, "--calibrate", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.long
def test_the_readmes_schedules_are_these() -> None:
    comparison = compare(plan_of(*recipe()), ScheduleAssumptions())
    lines = (RECIPE / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| schedule |")) + 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + 7]]
    expected = [
        [
            outcome.name,
            f"{outcome.seconds:,.0f}",
            f"{outcome.without_work:.0%}",
            f"{outcome.wasted:.0%}",
            f"{outcome.staleness:.2f}, {outcome.stalest}",
        ]
        for outcome in comparison.outcomes
    ]
    assert rows == [*expected, ["ideal", f"{comparison.ideal:,.0f}", "", "", ""]]
