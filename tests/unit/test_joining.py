"""Servers that join a run and leave it, against played servers: what is announced, who is taken in, and when."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config, load_config
from megatron_fipo.rollout.engine import Turn
from megatron_fipo.rollout.servers.announced import Announced, AnnouncedServers, GivenUp, share_out
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.joining import Joining, what_is_served, why_none_may_join
from megatron_fipo.rollout.servers.sending import Slots
from megatron_fipo.rollout.servers.server import State
from tests.unit.fake_servers import Fault, Machine, die, hang, refuse
from tests.unit.server_world import PlayedPolicy, World, request, tokens_of

NEWCOMER = 1
"""Number of the server that joins; number 0 is the run's own."""
MOST_REQUESTS = 4


class Run:
    """A run with one server of its own."""

    def __init__(self, world: World, method: Any = "tensor", **settings: Any) -> None:
        self.world, self.policy = world, PlayedPolicy(world)
        self.config = config(world)
        self.announced = AnnouncedServers(world.folder / "servers")
        pool = world.pool(num_own=1, max_concurrent_requests=MOST_REQUESTS, **settings)
        joining = Joining(self.announced, self.config, 0, 1, decide=lambda find: find())
        self.engine: ServerEngine = world.engine(
            pool, world.sync(pool, method), max_concurrent_requests=MOST_REQUESTS, num_canaries=2, joining=joining
        )
        self.engine.start()
        self.pool = pool

    def announce(self, name: str = "new", **changes: Any) -> Machine:
        """Somebody starts a server for the run."""
        machine = self.world.others_server(NEWCOMER)
        self.announced.announce(replace(announcement(self, name), **changes))
        return machine

    def give(self) -> None:
        """The next handover of weights."""
        self.policy.version += 1
        self.engine.give(self.policy, self.policy.version)

    def states(self) -> dict[str, State]:
        return {server.name: server.state for server in self.pool.servers}

    def close(self) -> None:
        self.engine.close()
        assert self.world.breaches == []


def tokens(turn: Turn) -> list[int]:
    return [token for segment in turn.segments for token in segment.token_ids.tolist()]


def config(world: World, *overrides: str) -> Config:
    return load_config(
        None,
        [
            f"model.path={world.base}",
            "data.train.s.kind=jsonl",
            "data.train.s.path=x",
            "rollout.engine=sglang",
            "servers.device=cpu",
            *overrides,
        ],
    )


def announcement(run: Run, name: str) -> Announced:
    return Announced(name, run.world.host, run.world.ports[NEWCOMER], what_is_served(run.config), "its key")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.mark.parametrize("method", ["tensor", "distributed", "disk"])
def test_who_comes_gets_weights_and_proves_them_before_its_first_request(world: World, method: str) -> None:
    run = Run(world, method)
    run.give()
    run.announce()
    requests = [world.begin(run.engine.generate(request(sample, group=sample, num_tokens=400))) for sample in range(8)]
    world.until(lambda: len(world.generated_at()) == MOST_REQUESTS)
    run.give()
    assert run.engine.capacity == 2 * MOST_REQUESTS
    turns = [world.run(one) for one in requests]
    assert [turn.segments[-1].policy_version for turn in turns] == [2] * 8
    world.advance(1.0)
    routes = world.routes(NEWCOMER)
    assert routes.index("generate") > max(routes.index(one) for one in ("resume", "checksums", "score", "score_end"))
    assert routes.count("generate") == MOST_REQUESTS
    run.close()


def test_it_waits_for_the_next_handover(world: World) -> None:
    run = Run(world)
    run.give()
    run.announce()
    world.run(run.engine.generate(request()))
    assert world.routes(NEWCOMER) == []
    assert run.engine.capacity == MOST_REQUESTS
    run.close()


@pytest.mark.parametrize("method", ["tensor", "distributed"])
@pytest.mark.parametrize(
    ("route", "fault", "words"),
    [
        ("load_bucket", refuse("this tensor has another shape"), "another shape"),
        ("load_bucket", die(), "broke off|connection reset|could not be asked"),
        ("checksums", lambda machine: machine.weights.update({"b": "other"}), "does not hold the weights"),
        ("score", lambda machine: setattr(machine, "skew", 1.0), "differ|difference"),
        ("score_end", refuse("no such route"), "no such route"),
        ("score", hang(), "did not answer"),
    ],
)
def test_who_cannot_prove_itself_is_no_reason_to_stop(
    world: World, method: str, route: str, fault: Fault, words: str
) -> None:
    run = Run(world, method)
    run.give()
    run.announce()
    if route == "load_bucket" and method == "distributed":
        route = "receive_bucket"
    world.fault(NEWCOMER, route, fault)
    run.give()
    assert world.routes(NEWCOMER).count("generate") == 0
    assert run.states()["new"] is State.LOST
    assert world.run(run.engine.generate(request())).finish_reason == "length"
    run.give()
    assert "new" not in run.states()
    given_up = run.announced.given_up("new")
    assert given_up is not None
    assert re.search(words, given_up.reason)
    assert run.engine.capacity == MOST_REQUESTS
    run.close()


def test_who_takes_back_what_it_announced_is_let_go(world: World) -> None:
    run = Run(world)
    run.announce()
    run.give()
    assert run.engine.capacity == 2 * MOST_REQUESTS
    requests = [world.begin(run.engine.generate(request(group=group, num_tokens=400))) for group in range(8)]
    world.until(lambda: world.generated_at().count(NEWCOMER) == MOST_REQUESTS)
    run.announced.withdraw("new")
    run.give()
    assert list(run.states()) == ["fake-0"]
    assert run.engine.capacity == MOST_REQUESTS
    assert [tokens(world.run(one)) for one in requests] == [
        tokens_of(request(group=group, num_tokens=400)) for group in range(8)
    ]
    assert run.announced.given_up("new") is None
    assert run.engine.metrics()["rollout/requests_resent"].value() == MOST_REQUESTS, "nobody waits for its answers"
    run.close()


def test_who_has_left_is_not_asked_for_its_health_again(world: World) -> None:
    run = Run(world, health_timeout_s=60.0)
    machine = run.announce()
    run.give()
    run.announced.withdraw("new")
    machine.end(143)
    world.call(lambda: run.pool.suspect(run.pool.servers[NEWCOMER], RuntimeError("gone")))
    assert world.until(lambda: run.states()["new"] is State.LOST) < 5.0
    run.close()


@pytest.mark.parametrize("withdrawn", [True, False])
def test_who_dies_is_not_waited_for(world: World, withdrawn: bool) -> None:
    """Where it had said that it leaves, not even for servers.health_timeout_s."""
    run = Run(world, health_timeout_s=60.0, start_timeout_s=900.0)
    machine = run.announce()
    run.give()
    requests = [world.begin(run.engine.generate(request(group=group, num_tokens=400))) for group in range(8)]
    world.until(lambda: world.generated_at().count(NEWCOMER) == MOST_REQUESTS)
    if withdrawn:
        run.announced.withdraw("new")
    machine.end(137)
    start = world.loop.time()
    run.give()
    assert world.loop.time() - start < (10.0 if withdrawn else 70.0)
    assert run.engine.capacity == MOST_REQUESTS
    assert all(world.run(one).finish_reason == "length" for one in requests)
    run.give()
    assert (run.announced.given_up("new") is None) == withdrawn
    run.close()


def test_who_could_not_be_reached_for_a_while_comes_back_or_waits_for_the_next_weights(world: World) -> None:
    run = Run(world)
    run.announce()
    run.give()
    world.call(lambda: run.pool.suspect(run.pool.servers[NEWCOMER], RuntimeError("cut off")))
    world.until(lambda: run.states()["new"] is State.READY)
    world.machines[NEWCOMER].version = "0"
    world.call(lambda: run.pool.suspect(run.pool.servers[NEWCOMER], RuntimeError("cut off")))
    world.until(lambda: run.states()["new"] is State.STALE)
    run.give()
    assert run.states()["new"] is State.READY
    run.close()


def test_when_the_runs_own_server_is_lost_those_that_joined_go_on(world: World) -> None:
    run = Run(world, max_restarts=0)
    run.announce()
    run.give()
    world.machines[0].end(1)
    assert world.run(run.engine.generate(request())).finish_reason == "length"
    run.give()
    assert run.states() == {"fake-0": State.LOST, "new": State.READY}
    run.close()


def test_a_newcomer_alone_with_the_weights_is_asked_to_prove_them(world: World) -> None:
    """The run's own server dies in the update that the newcomer joins in."""
    run = Run(world, max_restarts=0)
    run.give()
    run.announce()
    world.fault(0, "load_bucket", die())
    run.give()
    assert run.states()["new"] is State.READY
    world.until(lambda: run.states()["fake-0"] is State.LOST)
    run.close()


@pytest.mark.parametrize(
    ("changes", "words", "for_good"),
    [
        ({"serves": {"model.dtype": "bfloat16"}}, "model.dtype 'bfloat16', the run's servers 'float32'", True),
        ({"serves": {}}, "shape of model.path None", True),
        ({"port": 1}, "", False),
    ],
)
def test_who_is_of_no_use_hears_why_and_is_asked_once(
    world: World, changes: dict[str, Any], words: str, for_good: bool
) -> None:
    run = Run(world)
    if "serves" in changes:
        changes = {"serves": what_is_served(run.config) | changes["serves"] if changes["serves"] else {}}
    run.announce(**changes) if "port" not in changes else run.announced.announce(announcement(run, "new"))
    run.give()
    given_up = run.announced.given_up("new")
    assert given_up is not None
    assert words in given_up.reason
    assert given_up.for_good is for_good
    assert run.announced.read() == ([], [])
    num_asked = len(world.asked)
    run.announced.announce(announcement(run, "new"))
    run.give()
    assert [asked for asked in world.asked[num_asked:] if asked.server == NEWCOMER] == []
    run.close()


# --- who takes in whom ------------------------------------------------------------------------------------------------


def test_each_stays_where_it_is_and_a_new_one_goes_where_there_are_fewest() -> None:
    def named(*names: str) -> list[Announced]:
        return [Announced(name, "h", 1, {}, "") for name in names]

    first = share_out(named("a", "b", "c"), {}, 2)
    assert first == {"a": 0, "b": 1, "c": 0}
    assert share_out(named("b", "c"), first, 2) == {"b": 1, "c": 0}
    assert share_out(named("b", "d"), first, 2) == {"b": 1, "d": 0}


def test_an_owner_takes_in_its_own_alone(world: World) -> None:
    announced = AnnouncedServers(world.folder)
    for name in "abc":
        announced.announce(Announced(name, "h", 1, {}, ""))
    joining = [Joining(announced, config(world), owner, 2, lambda find: find()) for owner in (0, 1, None)]
    assert [[server.name for server in one.look()] for one in joining] == [["a", "c"], ["b"], []]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.engine=in_process"], "rollout.engine=in_process"),
        (["servers.placement=colocated"], "servers.placement=colocated"),
        (["servers.router=true"], "servers.router=true"),
        (["servers.device=cuda"], "servers.weight_sync=tensor"),
        (["servers.device=cuda", "servers.weight_sync=distributed"], ""),
        (["servers.device=cuda", "servers.weight_sync=disk"], ""),
        ([], ""),
    ],
)
def test_runs_that_nobody_can_join(world: World, overrides: list[str], words: str) -> None:
    reason = why_none_may_join(config(world, *overrides))
    assert words in reason
    assert bool(reason) == bool(words)


# --- what is announced ------------------------------------------------------------------------------------------------


def test_what_is_announced_is_read_back_and_nobody_else_reads_it(tmp_path: Path) -> None:
    announced = AnnouncedServers(tmp_path)
    assert announced.read() == ([], [])
    server = Announced("one", "10.0.0.1", 4000, {"servers.tp": 2}, "secret")
    announced.announce(server)
    assert announced.read() == ([server], [])
    assert announced.folder.stat().st_mode & 0o777 == 0o700
    assert (announced.folder / "one.json").stat().st_mode & 0o777 == 0o600
    assert "secret" not in repr(server)
    announced.give_up("one", "it died", for_good=False)
    assert announced.read() == ([], [])
    assert announced.given_up("one") == GivenUp("it died", for_good=False)
    announced.withdraw("one")
    assert announced.given_up("one") is None
    assert list(announced.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        ('{"name": "x"}', 0o600, "it announces no server"),
        ("{", 0o600, "it announces no server"),
        ("[]", 0o600, "it announces no server"),
        ('{"name": "y", "host": "h", "port": 1, "serves": {}, "key": ""}', 0o600, "it announces no server"),
        ('{"name": "x", "host": "h", "port": "1", "serves": {}, "key": ""}', 0o600, "it announces no server"),
        ('{"name": "x", "host": "h", "port": 1, "serves": [], "key": ""}', 0o600, "it announces no server"),
        ('{"name": "x", "host": "h", "port": 1, "serves": {}, "key": 7}', 0o600, "it announces no server"),
        ('{"name": "x", "host": "h", "port": 1, "serves": {}, "key": ""}', 0o644, "mode 644"),
        ('{"name": "x", "host": "h", "port": 1, "serves": {}, "key": ""}', 0o620, "mode 620"),
    ],
)
def test_what_may_be_somebody_elses_is_passed_over(tmp_path: Path, content: str, mode: int, words: str) -> None:
    announced = AnnouncedServers(tmp_path)
    announced.folder.mkdir()
    path = announced.folder / "x.json"
    path.write_text(content)
    path.chmod(mode)
    found, problems = announced.read()
    assert found == []
    assert len(problems) == 1
    assert str(path) in problems[0]
    assert words in problems[0]


def test_another_users_file_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced = AnnouncedServers(tmp_path)
    announced.announce(Announced("one", "h", 1, {}, ""))
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    found, problems = announced.read()
    assert found == []
    assert "must belong to this user (4711)" in problems[0]


def test_a_run_that_goes_on_is_not_finished_any_more(world: World) -> None:
    run = Run(world)
    run.announced.set_finished(True)
    assert not run.announced.is_finished, "nobody was ever announced"
    run.announce()
    run.announced.set_finished(True)
    assert run.announced.is_finished
    run.give()
    assert not run.announced.is_finished
    run.close()


# --- slots ------------------------------------------------------------------------------------------------------------


def test_slots_follow_their_number_and_keep_the_order() -> None:
    async def play() -> None:
        slots, inside, entered = Slots(2), set[int](), list[int]()
        leave = {number: asyncio.Event() for number in range(8)}

        async def use(number: int) -> None:
            async with slots:
                entered.append(number)
                inside.add(number)
                await leave[number].wait()
                inside.discard(number)

        tasks = [asyncio.ensure_future(use(number)) for number in range(8)]

        async def settle() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        await settle()
        assert inside == {0, 1}
        slots.change(4)
        await settle()
        assert inside == {0, 1, 2, 3}
        slots.change(1)
        leave[0].set()
        await settle()
        assert inside == {1, 2, 3}, "those that are in use go on, and no more come"
        tasks[4].cancel()
        for number in (1, 2, 3):
            leave[number].set()
        await settle()
        assert inside == {5}, "who waits no more has no turn"
        tasks[5].cancel()
        await settle()
        assert 6 in inside
        leave[6].set()
        leave[7].set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert entered == [0, 1, 2, 3, 5, 6, 7]

    asyncio.run(play())
