"""Servers that die in an update of their weights: it goes on with those that are left, the dead come back with the new
weights, and what is no death but a fault of weights still ends the run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_fipo.rollout.servers.api import LaunchSpec
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.http import (
    ServerConnection,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
)
from megatron_fipo.rollout.servers.proof import CanaryError
from megatron_fipo.rollout.servers.transfers import DistributedTransfer, Method
from megatron_fipo.rollout.servers.vllm.client import VllmServer
from tests.unit.fake_servers import Fault, Machine, die, hang, refuse, unavailable
from tests.unit.server_world import World, request
from tests.unit.test_weight_sync_sessions import METHODS, PHASES, ROUTES, Run, befall

NEXT_TO_NO_TIME_S = 15.0
"""On the scripted clock, where one wait for what a dead one will not do takes 100 s."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, num_servers=3)
    yield world
    world.close()


def expect_all_to_hold(world: World, run: Run, version: int) -> None:
    """Every server is back, with these weights, and generates."""
    run.wait_until_all_are_back()
    assert [machine.weights for machine in world.machines.values()] == [world.whole[str(version)]] * world.num_servers
    assert run.versions() == {version}


def later(world: World, seconds: float, fault: Fault) -> Fault:
    """A fault that befalls the server a while after its question has come."""
    return lambda machine: world.loop.call_later(seconds, fault, machine)


# --- the update goes on with those that are left ----------------------------------------------------------------------


@pytest.mark.parametrize(("method", "place"), PHASES)
def test_a_death_at_any_moment_costs_next_to_no_time_and_two_of_three_servers_go_on(
    world: World, method: Method, place: int
) -> None:
    run = Run(world, method)
    befall(world, 1, method, place, die())
    start = world.loop.time()
    report = run.sync.run(world.new_weights(1), "1")
    assert world.loop.time() - start < NEXT_TO_NO_TIME_S
    assert (report.num_servers, report.num_buckets) == (2, 3)
    assert run.versions() == {1}
    expect_all_to_hold(world, run, 1)
    assert run.pool.num_restarts == 1
    assert world.launched[-1].weight_version == "1"
    assert run.sync.run(world.new_weights(2), "2").num_servers == 3
    expect_all_to_hold(world, run, 2)
    run.close()


@pytest.mark.parametrize(("method", "place"), PHASES)
def test_two_of_three_die_one_after_the_other(world: World, method: Method, place: int) -> None:
    run = Run(world, method)
    befall(world, 1, method, place, die())
    befall(world, 2, method, min(place + 1, len(ROUTES[method]) - 1), die())
    assert run.sync.run(world.new_weights(1), "1").num_servers == 1
    expect_all_to_hold(world, run, 1)
    run.close()


@pytest.mark.parametrize("route", ["join_group", "receive_bucket"])
@pytest.mark.parametrize("lives_on", [True, False], ids=["hangs", "dies"])
def test_one_that_is_lost_while_the_others_wait_for_it_in_the_group_does_not_take_them_along(
    world: World, route: str, lives_on: bool
) -> None:
    """It has taken up the question; the others' connections to it break, and they say so, which is no refusal."""
    run = Run(world, "distributed")
    world.trips[0, route] = 3.0  # so that the others wait for this one
    fault = hang() if lives_on else later(world, 1.0, die())
    befall(world, 1, "distributed", ROUTES["distributed"].index(route), fault)
    start = world.loop.time()
    assert run.sync.run(world.new_weights(1), "1").num_servers == 2
    took = world.loop.time() - start
    assert took < (170.0 if lives_on else 25.0)
    assert len(world.meetings) == 2
    (again,) = {address for number, address in world.joined[-2:] if number == 0}
    assert (again.world_size, again.first_rank) == (3, 1)
    assert {number for number, _ in world.joined[-2:]} == {0, 2}
    expect_all_to_hold(world, run, 1)
    run.close()


@pytest.mark.parametrize("place", range(len(ROUTES["distributed"])))
def test_the_others_leave_a_group_that_broke_before_they_join_the_next(world: World, place: int) -> None:
    """Played servers refuse to leave what they are not in."""
    run = Run(world, "distributed")
    befall(world, 1, "distributed", place, die())
    run.sync.run(world.new_weights(1), "1")
    expect_all_to_hold(world, run, 1)
    run.sync.run(world.new_weights(2), "2")
    names = {address.name for _, address in world.joined}
    routes = ROUTES["distributed"]
    in_group = place >= routes.index("join_group") and "receive_bucket" in routes[place:]
    assert len(names) == (3 if in_group else 2)
    assert [machine.groups for machine in world.machines.values()] == [{world.joined[-1][1].name}] * 3
    run.close()
    assert all(meeting.has_been_left for meeting in world.meetings.values())


def test_a_bucket_is_sent_again_only_where_one_died_on_its_way(world: World) -> None:
    run = Run(world, "distributed")
    befall(world, 1, "distributed", ROUTES["distributed"].index("receive_bucket") + 1, die())
    run.sync.run(world.new_weights(1), "1")
    assert world.routes(0).count("receive_bucket") == 4
    assert world.routes(0).count("begin_update") == 1, "the update is not begun anew"
    run.close()


# --- none is left, but one comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "place"), PHASES)
@pytest.mark.parametrize("fault", [die(), hang()], ids=["dies", "hangs"])
def test_when_all_die_they_come_back_with_the_new_weights(
    world: World, method: Method, place: int, fault: Fault
) -> None:
    run = Run(world, method)
    in_flight = run.begin_some()
    for server in range(3):
        befall(world, server, method, place, fault)
    report = run.sync.run(world.new_weights(1), "1")
    assert (report.num_servers, report.num_buckets) == (0, 3)
    for each in in_flight:
        assert world.run(each, 900.0).policy_versions[-1][0] in (0, 1)
    expect_all_to_hold(world, run, 1)
    assert run.pool.num_restarts == 3
    assert run.sync.run(world.new_weights(2), "2").num_servers == 3
    run.close()


@pytest.mark.parametrize(("method", "place"), PHASES)
@pytest.mark.parametrize(
    "settings", [{"max_restarts": 0}, {"keeps_snapshot": False}], ids=["no restart", "no snapshot"]
)
def test_when_all_die_and_none_comes_back_the_run_ends_with_each_ones_reason(
    world: World, method: Method, place: int, settings: dict[str, int]
) -> None:
    if method == "disk" and "keeps_snapshot" in settings:
        return  # refused by the configuration's rules
    run = Run(world, method, **settings)  # type: ignore[arg-type]
    for server in range(3):
        befall(world, server, method, place, die())
    words = ".*".join(["no server survived the update: ", *world.urls])
    with pytest.raises(ServerError, match=words):
        run.sync.run(world.new_weights(1), "1")
    with pytest.raises(RuntimeError, match="no server can generate"):
        run.generate()
    run.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_server_of_somebody_else_that_dies_gets_the_next_weights_once_it_is_back(
    world: World, method: Method
) -> None:
    for number in range(3):
        world.others_server(number)
    pool = world.pool(attached=True)
    engine = world.engine(pool, sync := world.sync(pool, method))
    engine.start()
    befall(world, 1, method, 3, die())
    assert sync.run(world.new_weights(1), "1").num_servers == 2
    world.others_server(1)  # its owner's, anew
    world.until(lambda: "it waits for the next update (it is one of servers.urls" in pool.roster.reasons())
    assert sync.run(world.new_weights(2), "2").num_servers == 3
    assert pool.roster.reasons() == ""
    assert world.run(engine.generate(request())).policy_versions == [(2, 0, 4)]
    engine.close()
    assert world.breaches == []


def test_servers_of_others_are_not_waited_for_when_none_is_left(world: World) -> None:
    """They come back with weights that nobody has told them."""
    for number in range(3):
        world.others_server(number)
    pool = world.pool(attached=True)
    sync = world.sync(pool)
    engine = world.engine(pool, sync)
    engine.start()
    for server in range(3):
        befall(world, server, "tensor", 3, die())
    with pytest.raises(ServerError, match="no server survived the update"):
        sync.run(world.new_weights(1), "1")
    engine.close()


# --- on every rank, with the canary, with memory that is lent ---------------------------------------------------------


class Actor:
    """A policy whose log-probs are what played servers score."""

    vocab_size = 1000

    def __init__(self, world: World, version: int) -> None:
        self._world, self._version = world, version

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        return [[-1.0] * (len(sequence) - 1) for sequence in sequences]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._world.new_weights(self._version)

    def offload(self) -> None:
        pass

    def onload(self) -> None:
        pass


def given(world: World, method: Method = "tensor", *, colocated: bool = False, **settings: int) -> ServerEngine:
    """An engine that has started, with its canary."""
    pool = world.pool(**settings)
    engine = world.engine(pool, world.sync(pool, method), colocated=colocated, num_canaries=2)
    engine.start(Actor(world, 0))  # type: ignore[arg-type]
    return engine


def pool_of(engine: ServerEngine) -> list[str]:
    assert engine.owned is not None
    return [server.state.value for server in engine.owned.pool.servers]


def until_all_are_back(world: World, engine: ServerEngine) -> None:
    world.until(lambda: set(pool_of(engine)) == {"ready"})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_dead", [1, 3])
@pytest.mark.parametrize("route", ["begin_update", "checksums", "score"])
def test_the_canary_is_asked_of_those_that_are_left_or_come_back(
    world: World, method: Method, num_dead: int, route: str
) -> None:
    engine = given(world, method)
    for server in range(num_dead):
        world.fault(server, route, die())
    engine.give(Actor(world, 1), 1)  # type: ignore[arg-type]
    assert engine.metrics()["canary/log_prob_difference/mean"].value() == 0.0
    until_all_are_back(world, engine)
    assert world.run(engine.generate(request())).policy_versions == [(1, 0, 4)]
    engine.close()
    world.expect_sound()


@pytest.mark.parametrize("route", ["pause", "release_memory", "resume_memory weights", "load_bucket", "checksums"])
@pytest.mark.parametrize("num_dead", [1, 3])
def test_servers_beside_the_actor_come_back_when_there_is_memory(world: World, route: str, num_dead: int) -> None:
    """Whether one dies or all do, the update is packed and proven for whoever is started with it afterwards."""
    engine = given(world, colocated=True)
    engine.give(Actor(world, 1), 1)  # type: ignore[arg-type]
    for server in range(num_dead):
        world.fault(server, route, die())
    engine.take_back(Actor(world, 1))  # type: ignore[arg-type]
    engine.give(Actor(world, 2), 2)  # type: ignore[arg-type]
    until_all_are_back(world, engine)
    assert [spec.weight_version for spec in world.launched[3:]] == ["2"] * num_dead
    assert world.run(engine.generate(request())).policy_versions == [(2, 0, 4)]
    engine.close()
    world.expect_sound()


# --- what is no death still ends the run ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "place"), PHASES)
def test_a_death_does_not_hide_another_ones_refusal(world: World, method: Method, place: int) -> None:
    """Which it repeats when it is asked again, in a group without the dead one."""
    run = Run(world, method)
    befall(world, 1, method, place, die())
    befall(world, 2, method, place, refuse("shapes differ", 400))
    world.fault(2, ROUTES[method][place], refuse("shapes differ", 400))
    with pytest.raises(ServerError, match="400: shapes differ"):
        run.sync.run(world.new_weights(1), "1")
    assert run.pool.arrived is None
    with pytest.raises(RuntimeError, match=r"no server can generate: .*update to weights 1 failed: .*shapes differ"):
        run.generate()
    run.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [1, 3])
def test_a_death_does_not_hide_wrong_weights_of_another_one(world: World, method: Method, place: int) -> None:
    run = Run(world, method)
    befall(world, 1, method, place, die())

    def corrupt(machine: Machine) -> None:
        machine.weights["b"] = "other"

    world.fault(2, "checksums", corrupt)
    with pytest.raises(
        CanaryError, match=r"fake-2 .* does not hold the weights that were sent to it: 1 tensors differ"
    ):
        run.sync.run(world.new_weights(1), "1")
    with pytest.raises(RuntimeError, match="no server can generate"):
        run.generate()
    run.close()


def test_a_server_that_comes_back_with_wrong_weights_generates_nothing(world: World) -> None:
    run = Run(world, max_restarts=1)
    befall(world, 1, "tensor", 3, die())
    world.boots[1].append(lambda machine: machine.weights.update(a="a flipped bit"))
    run.sync.run(world.new_weights(1), "1")
    world.until(lambda: "its weights are not those of version 1" in run.pool.roster.reasons())
    num_before = len(world.generated_at())
    assert run.versions() == {1}
    assert 1 not in world.generated_at()[num_before:]
    run.close()


def test_one_that_cannot_be_reached_for_a_moment_is_not_trusted_with_what_it_may_have_missed(world: World) -> None:
    run = Run(world, "distributed")
    befall(world, 1, "distributed", 4, unavailable())
    assert run.sync.run(world.new_weights(1), "1").num_servers == 2
    expect_all_to_hold(world, run, 1)
    assert run.pool.num_restarts == 1
    run.close()


def test_a_bucket_that_is_not_sent_again_is_found_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the others missed as one died is missing in their checksums."""
    broadcast = DistributedTransfer._broadcast

    def broadcast_once(*arguments: Any) -> bool:
        broadcast(*arguments)
        return True

    monkeypatch.setattr(DistributedTransfer, "_broadcast", broadcast_once)
    run = Run(world, "distributed")
    world.trips[0, "receive_bucket"] = 3.0
    befall(world, 1, "distributed", 4, later(world, 1.0, die()))
    with pytest.raises(CanaryError, match="does not hold the weights that were sent to it: 1 tensors differ: b"):
        run.sync.run(world.new_weights(1), "1")
    with pytest.raises(RuntimeError, match="no server can generate"):
        run.generate()
    run.close()


# --- a death in other words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind"),
    [("EngineCore encountered an issue. See stack trace", ServerUnreachableError), ("no", ServerRefusedError)],
)
@pytest.mark.parametrize("ask", ["pause", "begin_update", "checksums", "end_update"])
def test_a_vllm_whose_engine_has_died_is_dead_though_it_answers(
    world: World, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[ServerError], ask: str
) -> None:
    async def post(connection: ServerConnection, route: str, body: Any = None, **options: Any) -> None:
        raise ServerRefusedError(f"{connection.url}{route} answered 500: {words}", 500)

    monkeypatch.setattr(ServerConnection, "post", post)
    spec = LaunchSpec("python", world.base, world.host, 1, "float32", "0", key="a key")
    client = VllmServer(ServerConnection(None, "http://server", key="a key"), spec)  # type: ignore[arg-type]
    asking = {
        "pause": client.pause,
        "begin_update": client.begin_update,
        "checksums": partial(client.checksums, 1.0),
        "end_update": partial(client.end_update, "1"),
    }[ask]
    with pytest.raises(ServerError, match=words) as caught:
        world.run(asking())
    assert type(caught.value) is kind
