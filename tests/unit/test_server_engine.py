"""The engine over servers: every request has one answer, its own, whatever befalls servers; against played ones."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers.api import ScoredEnd
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.http import ServerError, ServerRefusedError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.server import State
from tests.unit.fake_servers import (
    TOKEN_S,
    FakeServer,
    Fault,
    cut_off,
    die,
    drop_requests,
    hang,
    refuse,
    token,
    unavailable,
)
from tests.unit.server_world import PlayedPolicy, World, play_routers, request, tokens_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def started(world: World, *, colocated: bool = False, **options: object) -> ServerEngine:
    of_engine = {
        name: options.pop(name) for name in ("max_concurrent_requests", "request_timeout_s") if name in options
    }
    engine = world.engine(world.pool(**options), colocated=colocated, **of_engine)  # type: ignore[arg-type]
    engine.start()
    return engine


def close(world: World, engine: ServerEngine) -> None:
    expect_idle(world)
    engine.close()
    world.expect_sound()


def expect_idle(world: World) -> None:
    """No server works on a request that nobody waits for."""
    world.advance(70.0)
    assert [list(machine.running) for machine in world.machines.values()] == [[]] * world.num_servers


def value(engine: ServerEngine, name: str) -> float:
    return engine.metrics()[name].value()


def seeds_by_request(world: World) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for asked in world.asked:
        if asked.route == "generate":
            found.setdefault(asked.request_id.split("#")[0], set()).add(asked.seed)
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


def test_every_request_has_its_own_answer(world: World) -> None:
    engine = started(world)
    requests = [request(sample, group=group) for group in range(4) for sample in range(4)]
    samples = world.run(asyncio.wait_for(_all(engine, requests), 100.0))
    for asked, sample in zip(requests, samples, strict=True):
        assert (sample.prompt_id, sample.sample_index) == (asked.group_id, asked.sample_index)
        assert sample.prompt_ids.tolist() == list(asked.prompt_ids)
        assert sample.response_ids.tolist() == tokens_of(asked)
        assert sample.rollout_log_probs.tolist() == [-0.5] * 4
        assert sample.finish_reason == "length"
        assert sample.policy_versions == [(0, 0, 4)]
    ids = [asked.request_id for asked in world.asked if asked.route == "generate"]
    assert len(set(ids)) == len(requests)
    assert sorted(world.generated_at()) == [0] * 8 + [1] * 8
    close(world, engine)


async def _all(engine: ServerEngine, requests: Sequence[GenerationRequest]) -> list[Trajectory]:
    return await asyncio.gather(*(engine.generate(asked) for asked in requests))


def test_what_is_generated_after_a_prefix_is_counted_from_the_responses_start(world: World) -> None:
    engine = started(world)
    asked = request(num_tokens=6, prefix=(8, 9))
    sample = world.run(engine.generate(asked))
    assert sample.response_ids.tolist() == [token(asked.seed, position) for position in range(2, 6)]
    assert sample.policy_versions == [(0, 2, 6)]
    close(world, engine)


def test_no_more_requests_are_in_flight_than_are_allowed(world: World) -> None:
    engine = started(world, max_concurrent_requests=3)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, sum(len(machine.running) for machine in world.machines.values()))
            await asyncio.sleep(0.1)

    watching = world.begin(watch())
    start = world.loop.time()
    world.run(_all(engine, [request(sample, group=sample) for sample in range(9)]))
    assert most == 3
    assert 3 * 4 * TOKEN_S <= world.loop.time() - start < 3 * 4 * TOKEN_S + 1
    watching.cancel()
    close(world, engine)


def test_a_group_goes_on_elsewhere_when_its_server_is_full(world: World) -> None:
    """Slots that become free on one server, one by one, are given to a group that began on the other."""
    pool = world.pool(max_concurrent_requests=4)
    engine = world.engine(pool, max_concurrent_requests=8)
    engine.start()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, *(server.num_in_flight for server in pool.servers))
            await asyncio.sleep(0.1)

    watching = world.begin(watch())
    start = world.loop.time()
    world.run(_all(engine, [request(sample, group=sample // 6, num_tokens=10) for sample in range(24)]))
    assert most == 4, "none waits at a server while another one is idle"
    assert world.loop.time() - start < 3 * 10 * TOKEN_S + 1
    watching.cancel()
    close(world, engine)


def test_what_no_engine_could_generate_is_not_sent(world: World) -> None:
    engine = started(world)
    with pytest.raises(ValueError, match="the prompt is empty"):
        world.run(engine.generate(request(prompt_ids=())))
    assert world.generated_at() == []
    close(world, engine)


# --- requests whose answer is lost ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "num_restarts", "within_s"),
    [(die("killed"), 1, 15.0), (hang(), 1, 100.0), (cut_off(), 0, 15.0), (drop_requests(), 0, 15.0)],
    ids=["dies", "hangs", "cut off", "drops them"],
)
def test_requests_of_a_lost_server_are_sent_to_another_with_the_same_seed(
    world: World, fault: Fault, num_restarts: int, within_s: float
) -> None:
    engine = started(world)
    requests = [request(sample, group=group, num_tokens=8) for group in range(4) for sample in range(2)]
    answering = world.begin(_all(engine, requests))
    world.advance(2.5)
    victim = world.generated_at()[0]
    assert len(world.machines[victim].running) == 4
    fault(world.machines[victim])
    samples = world.run(answering, within_s)
    assert [sample.response_ids.tolist() for sample in samples] == [tokens_of(asked) for asked in requests]
    assert {sample.finish_reason for sample in samples} == {"length"}
    assert all(len(seeds) == 1 for seeds in seeds_by_request(world).values())
    assert len({asked.request_id for asked in world.asked if asked.route == "generate"}) == 8 + 4
    assert world.generated_at()[8:] == [1 - victim] * 4
    assert world.until(lambda: not pool_reasons(engine)) < 15.0
    metrics = engine.metrics()
    assert metrics["rollout/requests_resent"].value() == 4
    assert metrics["rollout/server_restarts"].value() == num_restarts
    assert value(engine, "rollout/requests_resent") == 0, "since they were last read"
    close(world, engine)


def pool_reasons(engine: ServerEngine) -> str:
    return pool_of(engine).roster.reasons()


def pool_of(engine: ServerEngine) -> ServerPool:
    assert engine.owned is not None
    return engine.owned.pool


def test_a_request_that_takes_too_long_is_ended_where_it_is_and_sent_again(world: World) -> None:
    engine = started(world, request_timeout_s=20.0)
    asked = request(num_tokens=8)
    answering = world.begin(engine.generate(asked))
    world.until(world.generated_at)
    (first,) = world.generated_at()
    world.machines[first].going_on.clear()  # it draws nothing; nor does it answer for its health
    sample = world.run(answering, 45.0)
    assert sample.response_ids.tolist() == tokens_of(asked)
    assert world.generated_at() == [first, 1 - first]
    (sent, _) = [each.request_id for each in world.asked if each.route == "generate"]
    assert sent in [each.request_id for each in world.asked if each.route == "cancel" and each.server == first]
    close(world, engine)


def test_while_all_servers_come_back_requests_wait_and_are_answered(world: World) -> None:
    engine = started(world)
    requests = [request(sample, group=sample) for sample in range(4)]
    answering = world.begin(_all(engine, requests))
    world.advance(1.5)
    for machine in world.machines.values():
        machine.end(1, "both at once")
    samples = world.run(answering, 30.0)
    assert [sample.response_ids.tolist() for sample in samples] == [tokens_of(asked) for asked in requests]
    assert value(engine, "rollout/server_restarts") == 2
    close(world, engine)


def test_a_request_that_kills_one_server_after_the_other_is_given_up_with_their_words(world: World) -> None:
    engine = started(world, max_restarts=10)
    for server in (0, 1):
        world.fault(server, "generate", *[die()] * 10)
    with pytest.raises(ServerError, match=r"(?s)sample '0/0' was sent 5 times and never answered:") as caught:
        world.run(engine.generate(request()))
    assert str(caught.value).count("connection reset") == 5
    assert len(world.generated_at()) == 5
    assert set(world.generated_at()) == {0, 1}
    for server in (0, 1):
        world.fault(server, "generate", None)
    close(world, engine)


def test_other_requests_live_through_the_deaths_of_servers_by_one(world: World) -> None:
    engine = started(world, max_restarts=10)
    others = [request(sample, group=sample, num_tokens=3) for sample in range(1, 3)]
    killer = world.begin(engine.generate(request(num_tokens=3)))
    world.fault(0, "generate", die())
    world.fault(1, "generate", die())
    samples = world.run(_all(engine, others))
    assert [sample.response_ids.tolist() for sample in samples] == [tokens_of(asked) for asked in others]
    assert world.run(killer).response_ids.tolist() == tokens_of(request(num_tokens=3))
    close(world, engine)


def test_when_no_server_is_left_every_request_fails_with_their_last_words(world: World) -> None:
    engine = started(world, max_restarts=0)
    answering = [world.begin(engine.generate(request(sample, group=sample))) for sample in range(4)]
    world.advance(1.5)
    for number, machine in world.machines.items():
        machine.end(128 + 9, f"words of {number}")
    words = r"(?s)no server can generate.*ended by signal 9.*words of 0.*servers\.max_restarts.*words of 1"
    for each in answering:
        with pytest.raises(ServerError, match=words):
            world.run(each)
    with pytest.raises(RuntimeError, match=words):
        world.run(engine.generate(request()))
    with pytest.raises(RuntimeError, match=words):
        world.run(engine.generate(request()))
    close(world, engine)


def test_what_a_server_refuses_is_raised_at_once_and_not_sent_again(world: World) -> None:
    engine = started(world)
    for server in (0, 1):
        world.fault(server, "generate", refuse("your prompt is too long", 400))
    with pytest.raises(ServerRefusedError, match="400: your prompt is too long"):
        world.run(engine.generate(request()))
    assert len(world.generated_at()) == 1
    world.fault(1 - world.generated_at()[0], "generate")
    close(world, engine)


def test_a_response_of_weights_that_nobody_handed_over_is_refused(world: World) -> None:
    engine = started(world)
    for machine in world.machines.values():
        machine.version = "somebody's"
    world.whole["somebody's"] = world.whole["0"]
    with pytest.raises(ServerError, match=r"generated with weights \"somebody's\" that were not handed over"):
        world.run(engine.generate(request()))
    close(world, engine)


@pytest.mark.parametrize("num_turns", range(12))
def test_a_server_that_becomes_stale_as_a_request_chooses_it_does_not_get_it(world: World, num_turns: int) -> None:
    """Between the choice and the sending there are turns of the loop; whichever it falls into."""
    engine = started(world)
    pool = pool_of(engine)
    world.run(pool.hold())
    answering = world.begin(engine.generate(request()))
    world.advance(1.0)

    async def let_go_and_take_back() -> int:
        await pool.let_go(pool.servers[:1])
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await pool.set_stale(pool.servers[0], "its log-probs are others")
        return len(world.generated_at())

    num_before = world.run(let_go_and_take_back())
    world.run(pool.let_go(pool.servers[1:]))
    assert world.run(answering).response_ids.tolist() == tokens_of(request())
    assert world.generated_at()[num_before:] == [1]
    close(world, engine)


# --- abort ------------------------------------------------------------------------------------------------------------


def test_abort_ends_what_is_sent_what_waits_for_its_turn_and_nothing_that_comes_after(world: World) -> None:
    engine = started(world, max_concurrent_requests=2)
    requests = [request(sample, group=sample, num_tokens=100) for sample in range(4)]
    answering = world.begin(_all(engine, requests))
    world.advance(3.5)
    engine.abort()
    samples = world.run(answering, 1.0)
    assert [sample.finish_reason for sample in samples] == ["abort"] * 4
    assert [len(sample.response_ids) for sample in samples] == [3, 3, 0, 0], "each has what there was"
    assert samples[0].policy_versions == [(0, 0, 3)]
    assert samples[3].policy_versions == []
    world.advance(1.0)
    num_cancels = [asked.route for asked in world.asked].count("cancel")
    world.advance(20.0)
    assert [asked.route for asked in world.asked].count("cancel") == num_cancels, "nobody is told of what has ended"
    assert world.run(engine.generate(request(7))).response_ids.tolist() == tokens_of(request(7))
    assert value(engine, "rollout/requests_resent") == 0
    close(world, engine)


def test_abort_ends_a_request_that_was_on_its_way_when_servers_ended_all_they_knew(world: World) -> None:
    engine = started(world)
    for server in (0, 1):
        world.trips[server, "generate"] = 3.0
    answering = world.begin(engine.generate(request(num_tokens=200)))
    world.advance(1.0)
    engine.abort()
    sample = world.run(answering, 5.0)
    assert sample.finish_reason == "abort"
    assert len(sample.response_ids) < 2
    close(world, engine)


@pytest.mark.parametrize("state", ["held", "restarting"])
def test_abort_ends_requests_that_wait_for_a_server(world: World, state: str) -> None:
    engine = started(world)
    pool = pool_of(engine)
    world.boot_s = 300.0
    if state == "held":
        world.run(pool.hold())
    else:
        for number, machine in world.machines.items():
            machine.end(1)
            world.call(lambda number=number: pool.suspect(pool.servers[number], ServerError("gone")))
    answering = world.begin(engine.generate(request()))
    world.advance(1.0)
    assert not answering.done()
    engine.abort()
    sample = world.run(answering, 0.1)
    assert sample.finish_reason == "abort"
    assert sample.response_ids.tolist() == []
    assert world.generated_at() == []
    if state == "held":
        world.run(pool.let_go_all())
    assert world.run(engine.generate(request(1))).response_ids.tolist() == tokens_of(request(1))
    close(world, engine)


@pytest.mark.parametrize(("fault", "within_s"), [(die(), 1.0), (hang(), 150.0)], ids=["dies", "hangs"])
def test_abort_ends_requests_of_a_server_that_is_lost_meanwhile(world: World, fault: Fault, within_s: float) -> None:
    engine = started(world)
    answering = world.begin(_all(engine, [request(sample, group=sample, num_tokens=900) for sample in range(2)]))
    world.advance(2.5)
    fault(world.machines[0])
    engine.abort()
    samples = world.run(answering, within_s)
    assert [sample.finish_reason for sample in samples] == ["abort", "abort"]
    assert len(world.generated_at()) == 2, "nothing was sent again"
    world.until(lambda: not pool_reasons(engine))
    close(world, engine)


# --- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["sent", "held", "restarting", "waiting for its turn"])
def test_a_request_that_is_cancelled_frees_all_it_held(world: World, state: str) -> None:
    engine = started(world, max_concurrent_requests=1)
    pool = pool_of(engine)
    first = None
    if state == "held":
        world.run(pool.hold())
    elif state == "restarting":
        for number, machine in world.machines.items():
            machine.end(1)
            world.call(lambda number=number: pool.suspect(pool.servers[number], ServerError("gone")))
    elif state == "waiting for its turn":
        first = world.begin(engine.generate(request(9, group=9, num_tokens=20)))
        world.advance(1.0)
    cancelled = world.begin(engine.generate(request(num_tokens=300)))
    world.advance(2.5)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        world.run(cancelled, 0.1)
    world.advance(1.0)
    if first is None:
        assert not any(machine.running for machine in world.machines.values())
    if state == "held":
        world.run(pool.let_go_all())
    # The one place is free again.
    assert world.run(engine.generate(request(1)), 30.0).response_ids.tolist() == tokens_of(request(1))
    if first is not None:
        assert world.run(first).response_ids.tolist() == tokens_of(request(9, group=9, num_tokens=20))
    assert [each for each in world.asked if each.route == "generate" and each.request_id.startswith("0/0")] == (
        [] if state != "sent" else world.asked[slice(*_first_generate(world))]
    )
    assert value(engine, "rollout/requests_resent") == 0
    close(world, engine)


def _first_generate(world: World) -> tuple[int, int]:
    place = [asked.route for asked in world.asked].index("generate")
    return place, place + 1


# --- a router ---------------------------------------------------------------------------------------------------------


def test_requests_go_through_the_router_while_every_server_may_generate(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_routers(world, monkeypatch)
    engine = started(world, router=True)
    requests = [request(sample, group=sample) for sample in range(4)]
    assert len(world.run(_all(engine, requests))) == 4
    assert [asked.through_router for asked in world.asked if asked.route == "generate"] == [True] * 4
    world.machines[0].end(1)
    world.until(lambda: pool_reasons(engine))
    num_before = len(world.generated_at())
    world.run(engine.generate(request(8)))
    assert [asked.through_router for asked in world.asked if asked.route == "generate"][num_before:] == [False]
    world.until(lambda: not pool_reasons(engine))
    world.run(engine.generate(request(9)))
    assert [asked.through_router for asked in world.asked if asked.route == "generate"][num_before:] == [False, True]
    close(world, engine)


def test_abort_through_a_router_reaches_whichever_server_has_the_request(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_routers(world, monkeypatch)
    engine = started(world, router=True)
    answering = world.begin(_all(engine, [request(sample, num_tokens=100) for sample in range(2)]))
    world.advance(2.5)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        world.run(answering)
    world.advance(1.0)
    assert not any(machine.running for machine in world.machines.values())
    close(world, engine)


@pytest.mark.parametrize(
    ("fault", "num_resent", "warns"),
    [("dies while sending", 4, True), ("has died", 0, True), ("answers errors", 4, False)],
)
def test_when_the_router_is_lost_requests_go_to_the_servers_themselves(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    num_resent: int,
    warns: bool,
) -> None:
    play_routers(world, monkeypatch)
    engine = started(world, router=True)
    (router,) = world.routers.values()
    requests = [request(sample, group=sample, num_tokens=8) for sample in range(4)]
    answering = world.begin(_all(engine, requests)) if fault == "dies while sending" else None
    world.advance(2.5)
    if fault == "answers errors":
        router.is_broken = True
    else:
        router.end(1, "thread 'main' panicked")
        for machine in world.machines.values():
            cut_off()(machine)
    samples = world.run(answering or _all(engine, requests), 60.0)
    assert [sample.response_ids.tolist() for sample in samples] == [tokens_of(asked) for asked in requests]
    assert value(engine, "rollout/requests_resent") == num_resent
    world.run(_all(engine, requests))
    assert caplog.text.count("requests go to the servers themselves from here on: the router ended (log: ") == warns
    assert ("thread 'main' panicked" in caplog.text) == warns
    assert world.launched == world.launched[:2], "nothing is wrong with the servers"
    close(world, engine)


def test_abort_reaches_a_request_that_the_router_brings_late_to_another_server_than_the_chosen_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_routers(world, monkeypatch)
    engine = started(world, router=True)
    for server in (0, 1):
        world.trips[server, "generate"] = 3.0
    answering = world.begin(_all(engine, [request(sample, num_tokens=200) for sample in range(2)]))
    world.advance(1.0)
    engine.abort()
    samples = world.run(answering, 5.0)
    assert [sample.finish_reason for sample in samples] == ["abort"] * 2
    assert sorted(world.generated_at()) == [0, 1], "of one group, and so both were meant for one server"
    close(world, engine)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_of_generation(world: World) -> None:
    engine = started(world)
    requests = [request(sample, group=sample, num_tokens=1 + sample, prompt_ids=(5, 6)) for sample in range(11)]
    world.run(_all(engine, requests))
    metrics = engine.metrics()
    assert metrics["time_s/rollout_slowest_sample"].value() == pytest.approx(11.0, abs=0.1)
    assert metrics["time_s/rollout_tail"].value() == pytest.approx(1.0, abs=0.1), "the last of ten"
    assert metrics["rollout/cached_prompt_share"].value() == pytest.approx(9 / 11), "each server computed it once"
    assert metrics["rollout/requests_resent"].value() == 0
    assert metrics["rollout/server_restarts"].value() == 0
    again = engine.metrics()
    assert "time_s/rollout_slowest_sample" not in again
    assert "weight_sync/transfer_s" not in again
    close(world, engine)


# --- memory -----------------------------------------------------------------------------------------------------------


def lend_update_take_back(world: World, engine: ServerEngine, version: int) -> None:
    engine.release_memory()
    engine.update_weights(world.new_weights(version), version)
    engine.resume_memory()


def test_memory_is_lent_and_taken_back_in_this_order(world: World) -> None:
    engine = started(world, colocated=True, health_interval_s=0.3)
    engine.release_memory()
    with pytest.raises(RuntimeError, match="the servers' memory is released"):
        world.run(engine.generate(request()))
    world.advance(50.0)  # the actor trains
    engine.update_weights(world.new_weights(1), 1)
    with pytest.raises(RuntimeError, match="the servers' memory is released"):
        world.run(engine.generate(request()))
    world.advance(50.0)
    engine.resume_memory()
    for server in (0, 1):
        assert world.routes(server) == [
            *("pause", "release_memory"),
            *("resume_memory weights", "pause", "begin_update", "load_bucket", "load_bucket", "load_bucket"),
            *("end_update", "checksums"),
            *("resume_memory cache", "resume"),
        ]
    sample = world.run(engine.generate(request()))
    assert sample.policy_versions == [(1, 0, 4)]
    lend_update_take_back(world, engine, 2)
    assert world.run(engine.generate(request())).policy_versions == [(2, 0, 4)]
    close(world, engine)


def test_no_question_after_health_meets_the_release(world: World) -> None:
    """Whenever it comes: servers die of it."""
    for wait_s in range(20):
        engine = started(world, colocated=True, health_interval_s=1.0)
        for server in (0, 1):
            world.trips[server, "health"] = 0.4
        world.advance(1.0 + wait_s / 15)
        lend_update_take_back(world, engine, 1)
        assert world.breaches == []
        engine.close()


@pytest.mark.parametrize("phase", ["pause", "release_memory", "resume_memory weights", "load_bucket", "checksums"])
@pytest.mark.parametrize("fault", [die(), hang(), unavailable()], ids=["dies", "hangs", "503"])
def test_who_is_lost_while_memory_is_lent_comes_back_when_there_is_memory_again(
    world: World, phase: str, fault: Fault
) -> None:
    engine = started(world, colocated=True)
    world.fault(1, phase, fault)
    engine.release_memory()
    world.advance(200.0)
    engine.update_weights(world.new_weights(1), 1)
    world.advance(200.0)
    assert len(world.launched) == 2, "what it would size its cache by is the actor's"
    assert world.machines[1].exit_status is not None, "what it held is the actor's, too"
    engine.resume_memory()
    assert world.run(engine.generate(request())).policy_versions == [(1, 0, 4)]
    assert world.generated_at() == [0]
    world.until(lambda: not pool_reasons(engine))
    assert world.launched[2].weight_version == "1"
    world.machines[0].end(1)
    assert world.run(engine.generate(request(1))).policy_versions == [(1, 0, 4)]
    world.until(lambda: not pool_reasons(engine))
    lend_update_take_back(world, engine, 2)
    assert world.run(engine.generate(request(2))).policy_versions == [(2, 0, 4)]
    close(world, engine)


@pytest.mark.parametrize("phase", ["resume_memory cache", "resume"])
def test_who_dies_as_its_memory_comes_back_is_restarted_then(world: World, phase: str) -> None:
    engine = started(world, colocated=True)
    world.fault(1, phase, die())
    lend_update_take_back(world, engine, 1)
    assert world.run(engine.generate(request())).policy_versions == [(1, 0, 4)]
    world.until(lambda: not pool_reasons(engine))
    assert len(world.launched) == 3
    close(world, engine)


@pytest.mark.parametrize("phase", ["pause", "release_memory", "resume_memory weights", "resume_memory cache"])
def test_a_server_that_refuses_to_lend_or_take_memory_ends_the_run_in_its_words(world: World, phase: str) -> None:
    engine = started(world, colocated=True)
    world.fault(1, phase, refuse("not now"))
    with pytest.raises(ServerError, match="500: not now"):
        lend_update_take_back(world, engine, 1)
    close(world, engine)


@pytest.mark.parametrize("settings", [{"max_restarts": 0}, {"keep_snapshot": False}], ids=str)
def test_when_all_die_while_memory_is_lent_and_none_comes_back_the_run_ends_in_words(
    world: World, settings: dict[str, object]
) -> None:
    engine = started(world, colocated=True, **settings)
    for server in (0, 1):
        world.fault(server, "release_memory", die(f"words of {server}"))
    with pytest.raises(ServerError, match=r"no server is left: fake-0 .*fake-1"):
        engine.release_memory()
    close(world, engine)


# --- weights and proof ------------------------------------------------------------------------------------------------


def test_requests_in_flight_go_on_with_the_new_weights_and_say_from_where(world: World) -> None:
    engine = started(world)
    answering = world.begin(_all(engine, [request(sample, group=sample, num_tokens=8) for sample in range(4)]))
    world.advance(3.5)
    engine.update_weights(world.new_weights(1), 1)
    samples = world.run(answering)
    assert {tuple(sample.policy_versions) for sample in samples} == {((0, 0, 3), (1, 3, 8))}
    metrics = engine.metrics()
    assert metrics["weight_sync/gigabytes"].value() == 3 * 16 / 1e9
    assert metrics["weight_sync/transfer_s"].value() > 0
    assert metrics["weight_sync/gigabytes_per_s"].value() == pytest.approx(
        3 * 16 / 1e9 / metrics["weight_sync/transfer_s"].value()
    )
    assert metrics["weight_sync/check_s"].value() > 0
    close(world, engine)


@pytest.mark.parametrize("breaks", ["stream", "server", "elsewhere"])
def test_an_update_that_fails_ends_the_run_on_every_rank_and_the_version_stays(world: World, breaks: str) -> None:
    told: list[str] = []

    def agree(problem: str) -> list[str]:
        told.append(problem)
        return [problem, "rank 3 is out of memory" if breaks == "elsewhere" and len(told) > 1 else ""]

    engine = world.engine(world.pool(), agree=agree)
    engine.start()
    drained = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in world.new_weights(1):
            yield name, tensor
            drained.append(name)
            if breaks == "stream" and name == "b":
                raise OSError("rank 3 is gone")

    if breaks == "server":
        world.fault(1, "load_bucket", refuse("shapes differ", 400))
    words = {"stream": "rank 3 is gone", "server": "400: shapes differ", "elsewhere": "rank 3 is out of memory"}[breaks]
    with pytest.raises(ServerError, match=words):
        engine.update_weights(stream(), 1)
    assert ("" if breaks == "elsewhere" else words) in told[-1]
    assert drained == (["a", "b"] if breaks == "stream" else ["a", "b", "c"])
    if breaks != "elsewhere":
        with pytest.raises(RuntimeError, match=f"(?s)no server can generate.*the update to weights 1 failed.*{words}"):
            world.run(engine.generate(request()))
    close(world, engine)


@pytest.mark.parametrize(("skew", "fails"), [(0.05, False), (0.2, True), (-0.2, True), (math.nan, True)], ids=str)
def test_a_server_that_computes_something_else_may_not_generate(world: World, skew: float, fails: bool) -> None:
    engine = started(world)
    world.machines[1].skew = skew
    sequences, actor = [[3, 4, 5], [6, 7]], [[-1.0, -1.0], [-1.0]]
    if fails:
        with pytest.raises(ServerError, match="fake-1 gives other log-probs than the actor"):
            engine.check_log_probs(sequences, actor)
        assert "fake-1 gives other log-probs" in pool_reasons(engine)
        world.run(_all(engine, [request(sample, group=sample) for sample in range(4)]))
        assert set(world.generated_at()) == {0}
        world.machines[1].skew = 0.0
        engine.update_weights(world.new_weights(1), 1)
        engine.check_log_probs(sequences, actor)
        assert pool_reasons(engine) == ""
    else:
        engine.check_log_probs(sequences, actor)
        assert value(engine, "canary/log_prob_difference/mean") == pytest.approx(skew)
    close(world, engine)


def with_canary(world: World, *, colocated: bool = False) -> tuple[ServerEngine, PlayedPolicy]:
    """An engine that has given weights once, and the policy that it was."""
    engine = world.engine(world.pool(), colocated=colocated, num_canaries=2)
    policy = PlayedPolicy(world)
    engine.start(policy)
    policy.version = 1
    engine.give(policy, 1)
    return engine, policy


def give_next(engine: ServerEngine, policy: PlayedPolicy) -> None:
    engine.take_back(policy)
    policy.version += 1
    engine.give(policy, policy.version)


CACHED = ("canary/cached_tokens/before", "canary/cached_tokens/after")


@pytest.mark.parametrize("colocated", [True, False])
def test_caches_are_warmed_before_an_update_and_proven_empty_after_it(world: World, colocated: bool) -> None:
    engine, policy = with_canary(world, colocated=colocated)
    metrics = engine.metrics()
    assert CACHED[0] not in metrics, "whether a server can generate before its first update is not known"
    assert metrics[CACHED[1]].value() == 0
    give_next(engine, policy)
    assert [value(engine, name) for name in CACHED] == [15, 0], "what comes before the last token; nothing of it"
    close(world, engine)


@pytest.mark.parametrize(
    ("counts", "skew", "words"),
    [
        (True, 0.0, r"fake-1 reuses keys .* directly after an update, 12 of a canary prompt's 12 tokens came from its"),
        (False, 0.2, r"fake-1 gives other log-probs than the actor where it may use its .* \|difference\| 0\.2 over 4"),
        (False, math.nan, "fake-1 gives other log-probs than the actor where it may use its prefix cache"),
    ],
)
@pytest.mark.parametrize("colocated", [True, False])
def test_a_server_that_keeps_its_cache_over_an_update_may_not_generate(
    world: World, colocated: bool, counts: bool, skew: float, words: str
) -> None:
    engine, policy = with_canary(world, colocated=colocated)
    machine = world.machines[1]
    machine.keeps_cache, machine.counts_cached, machine.cache_skew = True, counts, skew
    with pytest.raises(ServerError, match=f"{words}.*leave it out, or turn the prefix cache off"):
        give_next(engine, policy)
    assert "fake-1" in pool_reasons(engine)
    world.run(_all(engine, [request(sample, group=sample) for sample in range(4)]))
    assert set(world.generated_at()) == {0}
    machine.keeps_cache = False
    give_next(engine, policy)
    assert pool_reasons(engine) == ""
    close(world, engine)


def test_prompts_that_begin_alike_are_no_reuse(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the new weights, at a server that reuses single tokens: three of twelve."""
    engine, policy = with_canary(world)
    shared = 3
    score_end = FakeServer.score_end

    async def sharing(self: FakeServer, sequence: Sequence[int], num_tokens: int, timeout_s: float) -> ScoredEnd:
        return replace(await score_end(self, sequence, num_tokens, timeout_s), num_cached_tokens=shared)

    monkeypatch.setattr(FakeServer, "score_end", sharing)
    give_next(engine, policy)
    assert value(engine, CACHED[1]) == 3
    shared = 4
    with pytest.raises(ServerError, match="4 of a canary prompt's 12 tokens"):
        give_next(engine, policy)
    close(world, engine)


@pytest.mark.parametrize("fault", [die(), unavailable(), refuse("not now")], ids=["dies", "503", "refuses"])
@pytest.mark.parametrize("colocated", [True, False])
def test_a_server_whose_cache_cannot_be_warmed_is_looked_after_and_the_update_goes_on(
    world: World, colocated: bool, fault: Fault
) -> None:
    engine, policy = with_canary(world, colocated=colocated)
    world.fault(1, "score_end", fault)
    give_next(engine, policy)
    assert [value(engine, name) for name in CACHED] == [0, 0], "nothing is proven of it"
    world.until(lambda: not pool_reasons(engine))
    give_next(engine, policy)
    assert [value(engine, name) for name in CACHED] == [15, 0]
    close(world, engine)


def test_without_canary_sequences_no_server_is_asked_for_log_probs(world: World) -> None:
    engine = world.engine(world.pool())
    policy = PlayedPolicy(world)
    engine.start(policy)
    for version in (1, 2):
        policy.version = version
        engine.give(policy, version)
        assert policy.taken() == [*WRITTEN[:2], "policy weights", *WRITTEN[2:], "resume"]
    assert not [name for name in engine.metrics() if name.startswith("canary/")]
    close(world, engine)


@pytest.mark.parametrize(("fault", "num_restarts"), [(die(), 1), (unavailable(), 0)], ids=["dies", "503"])
def test_a_server_that_is_lost_while_it_is_compared_comes_back_and_the_other_is_compared(
    world: World, fault: Fault, num_restarts: int
) -> None:
    engine = started(world)
    world.fault(0, "score", fault)
    world.machines[1].skew = 0.05
    engine.check_log_probs([[3, 4, 5]], [[-1.0, -1.0]])
    assert value(engine, "canary/log_prob_difference/mean") == pytest.approx(0.05)
    world.until(lambda: not pool_reasons(engine))
    assert value(engine, "rollout/server_restarts") == num_restarts
    close(world, engine)


def test_where_no_server_is_left_to_be_compared_the_next_one_is_waited_for(world: World) -> None:
    engine = started(world)
    for server in (0, 1):
        world.fault(server, "score", die())
    engine.check_log_probs([[3, 4, 5]], [[-1.0, -1.0]])
    assert [asked.route for asked in world.asked].count("score") > 2
    world.until(lambda: not pool_reasons(engine))
    close(world, engine)


@pytest.mark.parametrize(
    ("fault", "restarts", "words"),
    [(die(), 0, "no server can generate: .*max_restarts.*max_restarts"), (unavailable(), 3, "no server answered for")],
    ids=["dies", "503"],
)
def test_servers_that_never_answer_for_their_log_probs_end_the_run(
    world: World, fault: Fault, restarts: int, words: str
) -> None:
    engine = started(world, max_restarts=restarts)
    for server in (0, 1):
        world.fault(server, "score", *[fault] * 10)
    with pytest.raises(ServerError, match=f"(?s){words}"):
        engine.check_log_probs([[3, 4, 5]], [[-1.0, -1.0]])
    close(world, engine)


WARMED = ["score_end", "score_end"]
WRITTEN = ["pause", "begin_update", "load_bucket", "load_bucket", "load_bucket", "end_update", "checksums"]


@pytest.mark.parametrize("colocated", [True, False])
def test_weights_are_given_and_memory_changes_hands_in_this_order(world: World, colocated: bool) -> None:
    engine = world.engine(world.pool(), colocated=colocated, num_canaries=2)
    policy = PlayedPolicy(world)
    engine.start(policy)
    lending = ["policy offload", "pause", "release_memory", "policy onload"]
    assert policy.taken() == (lending if colocated else [])
    for version in (1, 2):
        policy.version = version
        engine.give(policy, version)
        assert policy.taken() == (
            [
                *("policy score", "resume_memory weights", "pause", "begin_update", "policy weights"),
                *WRITTEN[2:],
                *("policy offload", "resume_memory cache", "resume", "score", "score_end"),
            ]
            if colocated
            else [
                *("policy score", *(WARMED if version > 1 else []), *WRITTEN[:2], "policy weights", *WRITTEN[2:]),
                *("resume", "score", "score_end"),
            ]
        )
        engine.give(policy, version)
        assert policy.taken() == [], "it has them"
        assert world.run(engine.generate(request())).policy_versions == [(version, 0, 4)]
        world.asked.clear()
        engine.take_back(policy)
        assert policy.taken() == ([*WARMED, "pause", "release_memory", "policy onload"] if colocated else [])
        engine.take_back(policy)
        assert policy.taken() == [], "nothing is lent"
    engine.close()
    world.expect_sound()


# --- start and close --------------------------------------------------------------------------------------------------


def test_nothing_is_started_where_the_check_before_fails_or_another_rank_does(world: World) -> None:
    def check() -> None:
        raise ServerError("two versions of NCCL")

    engine = world.engine(world.pool(), check_before_start=check)
    with pytest.raises(ServerError, match=r"^two versions of NCCL$"):
        engine.start()
    assert world.launched == []
    engine.close()


def test_a_server_that_does_not_start_is_raised_with_its_words_and_closing_is_safe(world: World) -> None:
    engine = world.engine(world.pool())
    world.boots[0].append(die("ImportError: no engine here"))
    with pytest.raises(ServerError, match="ImportError: no engine here"):
        engine.start()
    engine.close()
    engine.close()
    world.expect_sound()
    with pytest.raises(RuntimeError, match="the rollout engine is closed"):
        world.run(engine.generate(request()))


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.5, 3.9])
@pytest.mark.parametrize("then", ["nothing", "dies", "hangs", "abort", "held"])
def test_closing_with_requests_in_flight_ends_them_and_every_server(world: World, after_s: float, then: str) -> None:
    engine = started(world, health_timeout_s=5.0)
    pool = pool_of(engine)
    if then == "held":
        world.run(pool.hold())
    answering = [world.begin(engine.generate(request(sample, group=sample))) for sample in range(4)]
    world.advance(after_s)
    if then == "abort":
        engine.abort()
    elif then in ("dies", "hangs"):
        {"dies": die(), "hangs": hang()}[then](world.machines[0])
    engine.close()
    assert all(each.done() for each in answering)
    assert len(world.launched) == 2
    assert not asyncio.all_tasks(world.loop)
    world.expect_sound()
    assert [server.state for server in pool.servers] == [State.LOST] * 2


@pytest.mark.parametrize("colocated", [True, False])
def test_closing_after_an_update_that_was_interrupted_ends_everything(world: World, colocated: bool) -> None:
    engine = started(world, colocated=colocated)
    answering = (
        [] if colocated else [world.begin(engine.generate(request(sample, group=sample))) for sample in range(4)]
    )
    world.advance(1.5)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from world.new_weights(1)[:2]
        raise KeyboardInterrupt

    if colocated:
        engine.release_memory()
    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(stream(), 1)
    engine.close()
    assert all(each.done() for each in answering)
    assert not asyncio.all_tasks(world.loop)
    world.expect_sound()


@pytest.mark.parametrize("phase", ["lent", "weights only", "stale"])
def test_closing_between_lending_and_taking_back_ends_everything(world: World, phase: str) -> None:
    engine = started(world, colocated=True)
    if phase == "stale":
        world.fault(0, "checksums", refuse("no"))
    engine.release_memory()
    update: Callable[[], None] = lambda: engine.update_weights(world.new_weights(1), 1)  # noqa: E731
    if phase == "weights only":
        update()
    elif phase == "stale":
        with pytest.raises(ServerError):
            update()
    engine.close()
    assert not asyncio.all_tasks(world.loop)
    world.expect_sound()
