"""The pool of servers: who may generate when, and how one that is lost comes back, against played servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.revival import ArrivedWeights
from megatron_fipo.rollout.servers.server import Server
from tests.unit.fake_servers import Fault, Machine, die, hang, refuse, unavailable
from tests.unit.server_world import BOOT_S, CONFIG, World, play_routers, request, tokens_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def started(world: World, **options: object) -> ServerPool:
    pool = world.pool(**options)  # type: ignore[arg-type]
    world.run(pool.start())
    return pool


def close(world: World, pool: ServerPool) -> None:
    world.run(pool.close())
    world.expect_sound()


def arrive(world: World, pool: ServerPool, version: int, *, keeps_folder: bool = True) -> None:
    """Every server holds these weights from now on, and the pool knows them."""
    folder = world.folder / f"version-{version}"
    folder.mkdir()
    save_file(dict(world.new_weights(version)), folder / "model.safetensors")
    for machine in world.machines.values():
        machine.weights, machine.version = dict(world.whole[str(version)]), str(version)
    written: Future[Path] = Future()
    written.set_result(folder)
    arrived = ArrivedWeights(str(version), written if keeps_folder else None, world.whole[str(version)])
    world.run(pool.accept(arrived, pool.servers))


async def acquire(pool: ServerPool, group: int) -> Server:
    """The server of a request, once there is one."""
    while (server := pool.choose(group)) is None:
        await pool.wait_until_one_may_generate()
    return server


def acquired(world: World, pool: ServerPool, group: int = 0) -> int:
    """The number of the server that a request of a group would go to."""
    return pool.servers.index(world.run(acquire(pool, group)))


def suspect(world: World, pool: ServerPool, number: int) -> None:
    """As somebody does whose request was not answered."""
    world.call(lambda: pool.suspect(pool.servers[number], ServerError("gone")))


async def ask(pool: ServerPool, group: int, sample: int = 0) -> list[int]:
    """One request to whichever server the pool gives."""
    server = await acquire(pool, group)
    answering = server.client.generate(request(sample, group=group), f"{group}/{sample}", [1], 1000.0)
    return list((await server.ask(answering)).token_ids)


# --- starting ---------------------------------------------------------------------------------------------------------


def test_all_servers_start_at_the_same_time_and_end_with_the_pool(world: World) -> None:
    start = world.loop.time()
    pool = started(world)
    assert BOOT_S <= world.loop.time() - start < BOOT_S + 1
    assert [spec.port for spec in world.launched] == world.ports
    assert {acquired(world, pool, group) for group in range(2)} <= {0, 1}
    assert pool.num_restarts == 0
    close(world, pool)
    with pytest.raises(ServerError, match=r"no server can generate: fake-0 .*: it is closed; fake-1"):
        world.run(acquire(pool, 0))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (die("ValueError: no such model"), r"(?s)fake-1 exited with 1 \(log: .*fake-1\.log\).*no such model"),
        (die("CUDA out of memory", 128 + 9), r"(?s)fake-1 was ended by signal 9.*CUDA out of memory"),
        (hang(), r"fake-1 was not ready after 30 s \(servers\.start_timeout_s\)"),
    ],
)
def test_a_server_that_does_not_come_up_ends_the_start_and_all_others(world: World, fault: Fault, words: str) -> None:
    pool = world.pool(start_timeout_s=30.0)
    world.boots[1].append(fault)
    with pytest.raises(ServerError, match=words):
        world.run(pool.start())
    assert len(world.processes) == 2
    world.expect_sound()


def test_a_port_that_is_taken_is_named_and_nothing_is_left(world: World) -> None:
    pool = world.pool()
    with socket.create_server((world.host, world.ports[1])):  # noqa: SIM117
        with pytest.raises(ServerError, match=rf"port {world.ports[1]} .*fake-1 should listen, is taken"):
            world.run(pool.start())
    world.expect_sound()


def test_another_server_at_the_port_is_noticed_by_its_version(world: World) -> None:
    pool = world.pool()
    world.boots[0].append(lambda machine: setattr(machine, "version", "17"))
    with pytest.raises(ServerError, match=r"fake-0 reports weight version '17' and was started with '0': another serv"):
        world.run(pool.start())
    world.expect_sound()


def test_a_server_that_answers_strangers_is_not_taken(world: World) -> None:
    pool = world.pool()
    world.boots[1].append(lambda machine: setattr(machine, "answers_strangers", True))
    with pytest.raises(ServerError, match="fake-1 answers requests without the run's key"):
        world.run(pool.start())
    world.expect_sound()


# --- routing ----------------------------------------------------------------------------------------------------------


def test_a_group_stays_where_it_is_and_others_go_where_least_is_in_flight(world: World) -> None:
    pool = started(world)
    samples = [(1, 0), (2, 0), (1, 1), (1, 2), (1, 3), (3, 0), (4, 0)]
    answers = [world.begin(ask(pool, group, sample)) for group, sample in samples]
    assert [world.run(answer) for answer in answers] == [
        tokens_of(request(sample, group=group)) for group, sample in samples
    ]
    where = [(asked.group, asked.server) for asked in world.asked if asked.route == "generate"]
    by_group = dict(where)
    assert len(set(where)) == 4, "a group went to two servers"
    assert by_group[1] != by_group[2]
    assert by_group[3] == by_group[4] == by_group[2], "the server of group 1 had four in flight"
    for each in [world.begin(ask(pool, group)) for group in (10, 11, 12)]:
        world.run(each)
    assert world.generated_at()[-3:] == [0, 1, 0], "what has been answered does not count any more"
    close(world, pool)


def test_a_group_moves_when_its_server_is_lost_and_stays_there(world: World) -> None:
    pool = started(world)
    first = acquired(world, pool, 7)
    world.machines[first].end(1)
    suspect(world, pool, first)
    assert acquired(world, pool, 7) == 1 - first
    world.until(lambda: not pool.roster.reasons())
    assert acquired(world, pool, 7) == 1 - first
    close(world, pool)


# --- holding ----------------------------------------------------------------------------------------------------------


def test_a_request_that_arrives_while_servers_are_held_waits(world: World) -> None:
    pool = started(world)
    held = world.run(pool.hold())
    assert held == pool.servers
    asking = world.begin(ask(pool, 0))
    world.advance(300.0)
    assert not asking.done()
    assert world.generated_at() == []
    world.run(pool.let_go(held[:1]))
    assert world.run(asking) == tokens_of(request())
    assert world.generated_at() == [0], "the other one is held yet"
    world.run(pool.let_go_all())
    assert {acquired(world, pool, group) for group in (0,)} == {0}
    assert pool.roster.reasons() == ""
    close(world, pool)


def test_no_server_is_asked_after_its_health_while_it_is_held(world: World) -> None:
    pool = started(world)
    world.run(pool.hold())
    num_asked = len(world.asked)
    world.advance(100.0)
    assert len(world.asked) == num_asked
    world.run(pool.let_go_all())
    world.advance(100.0)
    assert len(world.asked) > num_asked, "the control: otherwise they are"
    close(world, pool)


def test_hold_waits_for_a_question_after_health_that_is_under_way(world: World) -> None:
    """SGLang dies of one that meets the release of its memory."""
    pool = started(world, health_interval_s=10.0)
    world.machines[1].going_on.clear()  # its answer takes until the time-out
    world.until(lambda: world.machines[1].num_probes)
    start = world.loop.time()
    world.run(pool.hold())
    assert world.machines[1].num_probes == 0
    assert 9.0 < world.loop.time() - start < 11.0
    world.machines[1].going_on.set()
    close(world, pool)


def test_hold_waits_for_a_restart_that_is_under_way(world: World) -> None:
    pool = started(world)
    world.machines[0].end(1)
    suspect(world, pool, 0)
    held = world.run(pool.hold())
    assert held == pool.servers
    assert pool.num_restarts == 1
    close(world, pool)


def test_hold_takes_what_lives(world: World) -> None:
    pool = started(world, max_restarts=0)
    world.machines[0].end(1, "the first one's words")
    suspect(world, pool, 0)
    assert world.run(pool.hold()) == pool.servers[1:]
    world.run(pool.let_go_all())
    world.machines[1].end(1, "the second one's words")
    suspect(world, pool, 1)
    with pytest.raises(ServerError, match=r"(?s)no server is left: .*the first one's words.*the second one's words"):
        world.run(pool.hold())
    close(world, pool)


def test_who_dies_while_it_is_held_comes_back_when_all_are_let_go(world: World) -> None:
    """Before that, the actor has the memory by which it would size its cache."""
    pool = started(world)
    world.run(pool.hold())
    world.fault(1, "pause", die())
    world.run(pool.on_held(lambda client: client.pause()))
    assert world.run(pool.hold()) == pool.servers[:1]
    world.advance(300.0)
    assert len(world.launched) == 2, "not yet"
    world.run(pool.on_held(lambda client: client.resume()))
    world.run(pool.let_go_all())
    world.until(lambda: not pool.roster.reasons())
    assert len(world.launched) == 3
    close(world, pool)


def test_a_request_waits_for_a_server_that_awaits_its_memory(world: World) -> None:
    pool = started(world)
    world.run(pool.hold())
    world.fault(1, "pause", die())
    world.run(pool.on_held(lambda client: client.pause()))
    world.run(pool.set_stale(pool.servers[0], "its weights are not proven"))
    asking = world.begin(ask(pool, 0))
    world.advance(100.0)
    assert not asking.done()
    world.run(pool.let_go_all())
    assert world.run(asking) == tokens_of(request())
    assert world.generated_at() == [1]
    close(world, pool)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ([None, refuse("I will not")], r"500: I will not"),
        ([die(), refuse("I will not")], r"500: I will not"),
        ([die(), die()], r"no server is left: fake-0 .*connection reset; fake-1 .*connection reset"),
    ],
)
def test_what_is_done_with_held_servers_fails_where_one_refuses_or_none_is_left(
    world: World, faults: list[Fault | None], words: str
) -> None:
    pool = started(world, max_restarts=0)
    world.run(pool.hold())
    for server, fault in enumerate(faults):
        world.fault(server, "pause", fault)
    with pytest.raises(ServerError, match=words):
        world.run(pool.on_held(lambda client: client.pause()))
    close(world, pool)


def test_a_stale_server_gets_no_requests_until_it_is_let_go(world: World) -> None:
    pool = started(world)
    asking = world.begin(ask(pool, 0))
    world.until(world.generated_at)
    (where,) = world.generated_at()
    world.run(pool.set_stale(pool.servers[where], "it missed an update"))
    with pytest.raises(ServerUnreachableError, match=f"fake-{where} went away: it missed an update"):
        world.run(asking)
    assert {acquired(world, pool, group) for group in range(8)} == {1 - where}
    assert f"fake-{where} ({world.urls[where]}): it missed an update" in pool.roster.reasons()
    world.advance(300.0)
    assert world.machines[where].exit_status is None, "it lives; nobody restarts it"
    assert set(world.run(pool.hold())) == set(pool.servers), "an update is what it needs"
    world.run(pool.let_go_all())
    assert {acquired(world, pool, group) for group in range(8, 16)} == {1 - where}, "what is stale stays so"
    world.run(pool.let_go(pool.servers))
    assert {acquired(world, pool, group) for group in (100,)} <= {0, 1}
    assert pool.roster.reasons() == ""
    close(world, pool)


def test_when_all_are_stale_a_request_is_refused_with_each_ones_reason(world: World) -> None:
    pool = started(world)
    asking: list[asyncio.Task[list[int]]] = []
    world.run(pool.hold())
    asking.append(world.begin(ask(pool, 0)))
    world.advance(1.0)
    for number, server in enumerate(pool.servers):
        world.run(pool.set_stale(server, f"reason {number}"))
    with pytest.raises(ServerError, match=r"no server can generate: .*reason 0.*reason 1"):
        world.run(asking[0])
    close(world, pool)


# --- coming back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "at_least_s", "at_most_s"),
    [
        (die("its last words"), BOOT_S, 20.0),
        (hang(), 60.0, 100.0),
    ],
    ids=["dies", "hangs"],
)
def test_a_lost_server_is_noticed_restarted_with_the_weights_checked_and_used(
    world: World, fault: Fault, at_least_s: float, at_most_s: float
) -> None:
    pool = started(world, health_interval_s=10.0, health_timeout_s=60.0)
    arrive(world, pool, 3)
    first_life = world.machines[1]
    fault(first_life)
    num_asked = len(world.asked)
    passed = world.until(lambda: pool.num_restarts and not pool.roster.reasons())
    assert at_least_s < passed < at_most_s
    assert pool.num_restarts == 1
    assert pool.arrived is not None
    assert pool.arrived.folder is not None
    assert world.launched[2] == replace(world.launched[1], model_path=pool.arrived.folder.result(), weight_version="3")
    assert world.machines[1] is not first_life
    assert first_life.exit_status is not None
    after = [asked.route for asked in world.asked[num_asked:] if asked.server == 1]
    assert after[after.index("info") :][:2] == ["info", "checksums"]
    assert {acquired(world, pool, group) for group in (51,)} <= {0, 1}
    # It generates with the newest weights; a token of others would be a breach.
    world.run(pool.set_stale(pool.servers[0], "so that it is the other one's turn"))
    assert world.run(ask(pool, 9)) == tokens_of(request(group=9))
    assert world.generated_at() == [1]
    close(world, pool)


def test_requests_of_a_server_that_hangs_fail_when_it_is_killed(world: World) -> None:
    pool = started(world, health_interval_s=10.0, health_timeout_s=60.0)
    server = world.run(acquire(pool, 0))
    where = pool.servers.index(server)
    asking = world.begin(ask(pool, 0))
    world.until(world.generated_at)
    world.machines[where].is_hanging = True
    with pytest.raises(ServerUnreachableError):
        world.run(asking)
    assert 60 < world.loop.time() - 1000 < 100, "long before the request's own time-out"
    assert world.generated_at() == [where]
    close(world, pool)


@pytest.mark.parametrize("attached", [False, True])
def test_requests_of_a_server_that_is_cut_off_fail_when_it_is_given_up(world: World, attached: bool) -> None:
    """Its end breaks no connection that this side would notice: nothing else would end them before their time-out."""
    for number in (0, 1):
        world.others_server(number)
    pool = started(world, attached=attached, health_interval_s=10.0, health_timeout_s=60.0)
    asking = world.begin(ask(pool, 0))
    world.until(world.generated_at)
    (where,) = world.generated_at()
    world.machines[where].is_hanging = world.machines[where].is_cut_off = True
    start = world.loop.time()
    with pytest.raises(ServerUnreachableError, match=f"fake-{where} went away"):
        world.run(asking)
    assert 60.0 < world.loop.time() - start < 100.0
    close(world, pool)


def test_others_go_on_while_one_comes_back_and_it_gets_nothing_before(world: World) -> None:
    pool = started(world)
    world.boot_s = 100.0
    world.machines[1].end(1)
    suspect(world, pool, 1)
    assert {acquired(world, pool, group) for group in range(8)} == {0}
    world.advance(99.0)
    assert acquired(world, pool, 8) == 0
    assert "fake-1" in pool.roster.reasons()
    world.until(lambda: not pool.roster.reasons(), within_s=10.0)
    close(world, pool)


def test_a_connection_that_broke_is_no_reason_to_restart(world: World) -> None:
    pool = started(world)
    arrive(world, pool, 3)
    world.fault(0, "health", unavailable(), unavailable(), refuse("busy"))
    world.until(lambda: pool.roster.reasons())
    assert world.until(lambda: not pool.roster.reasons()) < 5.0
    assert len(world.launched) == 2
    assert pool.num_restarts == 0
    assert "checksums" in world.routes(0), "another server may have been put in its place"
    close(world, pool)


def corrupt_two(world: World) -> None:
    """Both live, with other weights than they should have, and each is looked at once."""
    world.machines[0].weights["a"] = "one flipped bit"
    world.machines[1].version = "2"
    for server in (0, 1):
        world.fault(server, "health", unavailable())


OBSTACLES = {
    "attached": ("one of servers.urls, which are not started here", {"attached": True}),
    "no snapshot": ("servers.keep_snapshot=false: no weights to start it with are on disk", {}),
    "restarts used up": ("it was restarted 0 times: servers.max_restarts", {"max_restarts": 0}),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_another_server_in_its_place_is_stale_where_it_cannot_be_started_anew(
    world: World, obstacle: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Same address, other weights: it may generate after an update only, and says why."""
    words, options = OBSTACLES[obstacle]
    for number in (0, 1):
        world.others_server(number)
    pool = started(world, **options)
    arrive(world, pool, 3, keeps_folder=obstacle != "no snapshot")
    corrupt_two(world)
    world.until(lambda: pool.roster.reasons().count(words) == 2)
    assert "its weights are not those of version 3; it waits for the next update" in pool.roster.reasons()
    assert "it holds weights '2', not '3'; it waits for the next update" in pool.roster.reasons()
    assert caplog.text.count("generates nothing until the next update of the weights") == 2
    with pytest.raises(ServerError, match=r"no server can generate: fake-0 .* fake-1"):
        world.run(acquire(pool, 0))
    assert pool.num_restarts == 0
    assert set(world.run(pool.hold())) == set(pool.servers), "an update is what they need"
    world.run(pool.close())
    assert world.breaches == []


def test_another_server_in_its_place_is_started_anew_with_what_arrived(world: World) -> None:
    pool = started(world)
    arrive(world, pool, 3)
    corrupt_two(world)
    world.until(lambda: pool.num_restarts == 2 and not pool.roster.reasons())
    assert [machine.weights for machine in world.machines.values()] == [world.whole["3"]] * 2
    assert [spec.weight_version for spec in world.launched[2:]] == ["3", "3"]
    close(world, pool)


def test_a_server_that_holds_other_weights_even_then_is_stale(world: World) -> None:
    pool = started(world)
    arrive(world, pool, 3)
    world.boots[0].append(lambda machine: machine.weights.update(a="another flipped bit"))
    world.machines[0].weights["a"] = "one flipped bit"
    world.fault(0, "health", unavailable())
    world.until(lambda: "its weights are not those of version 3; it waits for the" in pool.roster.reasons())
    world.advance(300.0)
    assert pool.num_restarts == 1
    assert {acquired(world, pool, group) for group in range(8)} == {1}
    close(world, pool)


def unexpected(kind: type[Exception] = KeyError) -> Fault:
    """The client comes across something that nobody has thought of."""

    def fault(machine: Machine) -> None:
        raise kind("nobody thought of this")

    return fault


@pytest.mark.parametrize("route", ["health", "info", "checksums"])
@pytest.mark.parametrize("attached", [False, True])
def test_whatever_goes_wrong_while_a_server_is_looked_after_ends_in_words(
    world: World, route: str, attached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 1):
        world.others_server(number)
    pool = started(world, attached=attached, max_restarts=0)
    arrive(world, pool, 3)
    suspect(world, pool, 0)
    world.fault(0, route, unexpected())
    world.until(lambda: "KeyError: 'nobody thought of this'" in pool.roster.reasons())
    assert caplog.text.count("fake-0 is given up and stays away from here on: KeyError") == 1
    assert world.run(pool.hold()) == pool.servers[1:], "nobody waits for it"
    assert (world.machines[0].exit_status is None) == attached, "what was started here holds no memory for nothing"
    world.run(pool.let_go_all())
    world.run(pool.close())


def test_whatever_a_question_after_health_comes_across_the_watch_goes_on(world: World) -> None:
    pool = started(world, health_interval_s=10.0)
    world.trips[0, "health"] = 1.0  # so that it is seen while it is looked after
    world.fault(0, "health", unexpected(TypeError))
    world.until(lambda: "TypeError: nobody thought of this" in pool.roster.reasons())
    world.until(lambda: not pool.roster.reasons())
    assert pool.num_restarts == 0
    world.machines[1].end(1)
    world.until(lambda: pool.num_restarts == 1 and not pool.roster.reasons())
    close(world, pool)


def test_without_a_snapshot_a_restarted_server_waits_for_the_next_update(world: World) -> None:
    pool = started(world)
    arrive(world, pool, 3, keeps_folder=False)
    world.machines[0].end(1)
    suspect(world, pool, 0)
    world.until(lambda: "it holds weights 'never synced', not '3'" in pool.roster.reasons())
    assert world.launched[2].model_path == world.base
    assert world.launched[2].weight_version == "never synced", "the base model must not pass for version 0 of training"
    assert {acquired(world, pool, group) for group in range(8)} == {1}
    assert set(world.run(pool.hold())) == set(pool.servers)
    close(world, pool)


def test_before_the_first_update_it_comes_back_with_the_starting_model(world: World) -> None:
    pool = started(world)
    world.machines[0].end(1)
    suspect(world, pool, 0)
    world.until(lambda: not pool.roster.reasons())
    assert world.launched[2] == world.launched[0]
    close(world, pool)


def test_restarts_are_counted_for_each_server_and_the_next_death_is_the_last(world: World) -> None:
    pool = started(world, max_restarts=2)
    for life in range(3):
        for number in (0, 1):
            world.machines[number].end(1, f"words of life {life} of {number}")
            suspect(world, pool, number)
        world.advance(30.0)
    assert pool.num_restarts == 4
    words = (
        r"(?s)no server can generate: fake-0 .*fake-0 exited with 1 .*words of life 2 of 0"
        r".*restarted 2 times: servers\.max_restarts.*words of life 2 of 1"
    )
    with pytest.raises(ServerError, match=words):
        world.run(acquire(pool, 0))
    close(world, pool)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(die("OSError: no space left"), "no space left"), (hang(), r"was not ready after 30 s")],
)
def test_a_restart_that_does_not_come_up_is_given_up_in_words_and_leaves_no_process(
    world: World, fault: Fault, words: str
) -> None:
    pool = started(world, start_timeout_s=30.0)
    world.boots[0].append(fault)
    world.machines[0].end(1)
    suspect(world, pool, 0)
    world.until(lambda: pool.roster.reasons())
    world.until(lambda: re.search(words, pool.roster.reasons()), within_s=40.0)
    assert pool.num_restarts == 1
    assert {acquired(world, pool, group) for group in range(8)} == {1}
    close(world, pool)


def test_a_server_that_this_engine_cannot_start_again_is_given_up_and_nobody_waits_for_it(world: World) -> None:
    pool = started(world)
    world.launch_problem = "servers.extra_args: the newest weights have no tokenizer"
    world.machines[0].end(1)
    suspect(world, pool, 0)
    world.until(lambda: world.launch_problem in pool.roster.reasons())
    assert world.run(pool.hold()) == pool.servers[1:]
    close(world, pool)


# --- attached ---------------------------------------------------------------------------------------------------------


def test_servers_of_others_are_never_started_restarted_or_ended(world: World) -> None:
    for number in (0, 1):
        world.others_server(number)
    pool = started(world, attached=True, health_timeout_s=20.0)
    world.machines[0].end(1, "its owner has ended it")
    world.until(lambda: pool.roster.reasons())
    assert {acquired(world, pool, group) for group in range(8)} == {1}
    world.advance(100.0)
    assert world.launched == []
    world.others_server(0, boot_s=0.0)  # its owner starts it anew
    world.until(lambda: not pool.roster.reasons(), within_s=30.0)
    assert pool.num_restarts == 0
    close(world, pool)
    assert world.launched == []
    assert [machine.exit_status for machine in world.machines.values()] == [None, None]


def test_a_server_of_others_that_comes_back_without_the_newest_weights_is_stale(world: World) -> None:
    for number in (0, 1):
        world.others_server(number)
    pool = started(world, attached=True, health_timeout_s=20.0)
    arrive(world, pool, 3)
    world.machines[0].end(1)
    world.until(lambda: pool.roster.reasons())
    world.others_server(0)
    world.until(lambda: "it holds weights '0', not '3'" in pool.roster.reasons())
    assert {acquired(world, pool, group) for group in range(8)} == {1}
    close(world, pool)


def test_a_server_of_others_that_stays_away_is_given_up_after_the_time_of_a_start(world: World) -> None:
    for number in (0, 1):
        world.others_server(number)
    pool = started(world, attached=True, health_timeout_s=20.0, start_timeout_s=50.0)
    world.machines[0].end(1)
    world.until(lambda: pool.roster.reasons())
    passed = world.until(lambda: "fake-0 was not ready after 50 s" in pool.roster.reasons())
    assert 60.0 < passed < 80.0
    assert "(one of servers.urls)" in pool.roster.reasons()
    close(world, pool)


def test_a_server_of_others_with_another_model_is_refused_before_it_is_written(world: World) -> None:
    other = world.folder / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 64}))
    world.others_server(0)
    world.others_server(1, folder=other)
    with pytest.raises(ServerError, match=r"fake-1 .*one of servers.urls.* whose hidden_size is 64; .* is 32"):
        started(world, attached=True)
    assert world.routes(1) == []


# --- a router ---------------------------------------------------------------------------------------------------------


def test_a_router_is_started_before_the_servers_that_are_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    play_routers(world, monkeypatch)
    pool = started(world, router=True)
    assert pool.usable_router is not None
    world.run(pool.hold())
    assert pool.usable_router is None, "it would send to servers that must not generate"
    world.run(pool.let_go_all())
    assert pool.usable_router is not None
    close(world, pool)
    assert len(world.processes) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("error: unexpected argument", r"the router ended \(log: .*router\.log\)\. It reported:.*unexpected argument"),
        ("", r"the router was not ready after 30 s \(servers\.start_timeout_s\): .*its log is .*router\.log"),
    ],
)
def test_a_router_that_does_not_start_ends_the_start(
    world: World, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    play_routers(world, monkeypatch)
    pool = world.pool(router=True, start_timeout_s=30.0)
    starting = world.begin(pool.start())
    world.until(lambda: world.routers)
    for router in world.routers.values():
        router.ready_at += 1e6
        if words:
            router.end(2, words)
    with pytest.raises(ServerError, match=f"(?s){message}"):
        world.run(starting)
    assert len(world.processes) == 3
    world.expect_sound()


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_s", [0.0, 1.0, 4.999, 5.0, 5.1, 5.3, 8.0])
def test_closing_during_the_start_ends_everything(world: World, after_s: float) -> None:
    pool = world.pool()
    starting = world.begin(pool.start())
    world.advance(after_s)
    world.run(pool.close())
    world.thread.stop()
    assert starting.done()
    world.expect_sound()


@pytest.mark.parametrize("after_s", [0.0, 0.2, 0.5, 1.0, 3.0, 5.4, 5.8, 30.0])
@pytest.mark.parametrize("fault", [die(), hang()], ids=["dies", "hangs"])
def test_closing_during_a_restart_ends_everything(world: World, after_s: float, fault: Fault) -> None:
    pool = started(world, health_timeout_s=1.0)
    fault(world.machines[0])
    suspect(world, pool, 0)
    world.advance(after_s)
    world.run(pool.close())
    world.advance(300.0)
    world.expect_sound()


def test_closing_with_requests_in_flight_starts_no_server_anew(world: World) -> None:
    """They fail as the servers end, and a server whose requests fail is suspected."""
    pool = started(world)
    failures: list[str] = []

    async def ask_and_suspect(group: int) -> None:
        server = await acquire(pool, group)
        try:
            await server.ask(server.client.generate(request(group=group), str(group), [1], 100.0))
        except ServerError as error:
            failures.append(str(error))
            pool.suspect(server, error)

    asking = [world.begin(ask_and_suspect(group)) for group in range(4)]
    world.advance(1.5)
    world.run(pool.close())
    world.advance(300.0)
    assert len(failures) == 4
    assert all(each.done() for each in asking)
    assert len(world.launched) == 2
    world.expect_sound()


def test_who_waits_for_a_server_hears_that_the_pool_is_closed(world: World) -> None:
    pool = started(world)
    world.run(pool.hold())
    waiting = world.begin(acquire(pool, 0))
    world.advance(1.0)
    world.run(pool.close())
    with pytest.raises(ServerError, match="it is closed"):
        world.run(waiting, within_s=10.0)
    world.expect_sound()
