"""Updates of the weights of played servers: whatever befalls one half-way, no token is drawn with weights that are not
whole. The played servers look at each token they draw (`World.breaches`)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.servers import backlog, snapshots, sync
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.proof import CanaryError
from megatron_fipo.rollout.servers.sync import WeightSync
from megatron_fipo.rollout.servers.transfers import Method
from megatron_fipo.system.disk import DiskError
from tests.unit.fake_servers import BUCKET_S, Fault, Machine, die, hang, refuse, unavailable
from tests.unit.server_world import World, request, tokens_of

METHODS: tuple[Method, ...] = ("tensor", "distributed", "disk")
ROUTES = {
    "tensor": ["pause", "begin_update", *["load_bucket"] * 3, "end_update", "checksums", "resume"],
    "distributed": [
        "pause",
        "begin_update",
        "join_group",
        *["receive_bucket"] * 3,
        "end_update",
        "checksums",
        "resume",
    ],
    "disk": ["pause", "begin_update", "load_folder", "end_update", "checksums", "resume"],
}
PHASES = [(method, place) for method in METHODS for place in range(len(ROUTES[method]))]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


class Run:
    """An engine that is started, and its update."""

    def __init__(
        self, world: World, method: Method = "tensor", *, keeps_snapshot: bool = True, **settings: Any
    ) -> None:
        self.world, pool = world, world.pool(keep_snapshot=keeps_snapshot, **settings)
        self.pool, self.sync = pool, world.sync(pool, method, keeps_snapshot=keeps_snapshot)
        self.engine: ServerEngine = world.engine(pool, self.sync)
        self.engine.start()

    def generate(self, count: int = 4, num_tokens: int = 4) -> list[Trajectory]:
        """One request of each of several groups; so every server that may generate has some."""

        async def all_of_them() -> list[Trajectory]:
            requests = (request(0, group=group, num_tokens=num_tokens) for group in range(count))
            return list(await asyncio.gather(*map(self.engine.generate, requests)))

        return self.world.run(all_of_them(), 900.0)

    def begin_some(self) -> list[asyncio.Task[Trajectory]]:
        """Requests of which two tokens have been drawn."""
        generate = self.engine.generate
        begun = [self.world.begin(generate(request(0, group=group, num_tokens=9))) for group in range(4)]
        self.world.advance(2.5)
        return begun

    def versions(self) -> set[int]:
        """Of the weights that responses are generated with now."""
        return {version for sample in self.generate() for version, _, _ in sample.policy_versions}

    def wait_until_all_are_back(self) -> None:
        self.world.until(lambda: not self.pool.roster.reasons())

    def close(self) -> None:
        self.engine.close()
        assert not asyncio.all_tasks(self.world.loop)
        self.world.expect_sound()


def befall(world: World, server: int, method: Method, place: int, fault: Fault) -> None:
    """A fault at one question of an update."""
    route = ROUTES[method][place]
    before = ROUTES[method][:place].count(route)
    world.fault(server, route, *[None] * before, fault)


# --- updates that succeed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_server_is_written_proven_and_only_then_goes_on(world: World, method: Method) -> None:
    run = Run(world, method)
    report = run.sync.run(world.new_weights(1), "1")
    assert world.routes(0) == world.routes(1) == ROUTES[method]
    assert [machine.weights for machine in world.machines.values()] == [world.whole["1"]] * 2
    assert (report.num_bytes, report.num_buckets, report.num_servers) == (48, 3, 2)
    assert report.transfer_s > 0
    assert report.check_s > 0
    assert run.pool.arrived is not None
    assert (run.pool.arrived.version, run.pool.arrived.checksums) == ("1", world.whole["1"])
    assert run.versions() == {1}
    run.close()


def test_servers_are_written_at_the_same_time_while_the_next_bucket_is_packed(world: World) -> None:
    run = Run(world)
    start = world.loop.time()
    run.sync.run(world.new_weights(1), "1")
    assert 3 * BUCKET_S <= world.loop.time() - start < 3 * BUCKET_S + 1
    run.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_request_that_arrives_in_an_update_waits_and_one_in_flight_goes_on(world: World, method: Method) -> None:
    run = Run(world, method)

    async def later() -> Trajectory:
        await asyncio.sleep(3.0)
        return await run.engine.generate(request(1, group=9))

    early = world.begin(run.engine.generate(request(0, num_tokens=6)))
    world.advance(2.5)
    late = world.begin(later())
    run.sync.run(world.new_weights(1), "1")
    assert world.run(early).policy_versions == [(0, 0, 2), (1, 2, 6)]
    assert world.run(late).policy_versions == [(1, 0, 4)]
    routes = [asked.route for asked in world.asked if asked.route in ("generate", "pause", "resume")]
    assert routes == ["generate", "pause", "pause", "resume", "resume", "generate"]
    run.close()


def test_an_update_waits_for_a_server_that_comes_back(world: World) -> None:
    run = Run(world)
    world.machines[1].end(1)
    world.until(lambda: run.pool.roster.reasons())
    report = run.sync.run(world.new_weights(1), "1")
    assert report.num_servers == 2
    assert run.versions() == {1}
    assert set(world.generated_at()) == {0, 1}
    run.close()


def test_an_update_makes_a_stale_server_sound_and_leaves_a_lost_one_out(world: World) -> None:
    run = Run(world)
    world.run(run.pool.set_stale(run.pool.servers[1], "for a reason"))
    assert run.sync.run(world.new_weights(1), "1").num_servers == 2
    assert run.pool.roster.reasons() == ""
    world.boots[1].append(die("it cannot start any more"))
    world.machines[1].end(1)
    world.until(lambda: "it cannot start any more" in run.pool.roster.reasons())
    assert run.sync.run(world.new_weights(2), "2").num_servers == 1
    assert run.versions() == {2}
    assert "it cannot start any more" in run.pool.roster.reasons()
    run.close()


@pytest.mark.parametrize("method", METHODS)
def test_servers_that_are_kept_held_do_not_go_on(world: World, method: Method) -> None:
    run = Run(world, method)
    run.sync.run(world.new_weights(1), "1", keep_held=True)
    assert world.routes(0) == ROUTES[method][:-1]
    waiting = world.begin(run.engine.generate(request()))
    world.advance(300.0)
    assert not waiting.done()
    assert world.generated_at() == []
    waiting.cancel()
    run.close()


def test_what_readies_servers_comes_first_and_where_it_fails_nothing_is_written(world: World) -> None:
    run = Run(world)
    stream = iter(world.new_weights(1))

    def fail() -> None:
        raise ServerError("no memory")

    with pytest.raises(ServerError, match="no memory"):
        run.sync.run(stream, "1", beforehand=fail)
    assert list(stream) == [], "other ranks send into it"
    assert world.routes(0) == []
    assert run.versions() == {0}
    run.close()


# --- a process group --------------------------------------------------------------------------------------------------


def test_the_process_group_lives_until_a_server_changes(world: World) -> None:
    run = Run(world, "distributed")
    for version in (1, 2):
        run.sync.run(world.new_weights(version), str(version))
    assert [(server, address.first_rank, address.world_size) for server, address in world.joined] == [
        (0, 1, 3),
        (1, 2, 3),
    ]
    (first,) = {address.name for _, address in world.joined}
    world.machines[1].end(1)
    world.until(lambda: run.pool.num_restarts and not run.pool.roster.reasons())
    run.sync.run(world.new_weights(3), "3")
    assert len(world.joined) == 4
    (second,) = {address.name for _, address in world.joined[2:]}
    assert first != second
    assert world.meetings[first].has_been_left
    assert world.machines[0].groups == world.machines[1].groups == {second}
    assert world.routes(0).count("leave_group") == 1
    assert world.routes(1).count("leave_group") == 0, "its new life has never been in the old one"
    assert run.versions() == {3}
    run.close()
    assert world.meetings[second].has_been_left


# --- updates that fail half-way ---------------------------------------------------------------------------------------


LOST = pytest.mark.parametrize("fault", [die("its last words"), hang(), unavailable()], ids=["dies", "hangs", "503"])


@pytest.mark.parametrize(("method", "place"), PHASES)
@LOST
def test_a_server_that_is_lost_half_way_comes_back_with_the_new_weights(
    world: World, method: Method, place: int, fault: Fault
) -> None:
    run = Run(world, method)
    in_flight = run.begin_some()
    befall(world, 1, method, place, fault)
    assert run.sync.run(world.new_weights(1), "1").num_servers == 1
    for each in in_flight:
        sample = world.run(each, 900.0)
        assert sample.response_ids.tolist() == tokens_of(request(0, group=sample.prompt_id, num_tokens=9))
    # Also one that lives, has its old weights, and answers for its health, is started anew with the new ones.
    run.wait_until_all_are_back()
    assert run.pool.num_restarts == 1
    world.run(run.pool.set_stale(run.pool.servers[0], "so that it is the other one's turn"))
    assert run.versions() == {1}
    assert run.sync.run(world.new_weights(2), "2").num_servers == 2
    assert run.pool.roster.reasons() == ""
    assert run.versions() == {2}
    run.close()


@pytest.mark.parametrize(("method", "place"), PHASES)
def test_a_server_that_refuses_half_way_ends_the_update_and_no_server_generates(
    world: World, method: Method, place: int
) -> None:
    run = Run(world, method)
    in_flight = run.begin_some()
    befall(world, 1, method, place, refuse("shapes differ", 400))
    stream = iter(world.new_weights(1))
    with pytest.raises(ServerError, match="400: shapes differ"):
        run.sync.run(stream, "1")
    assert list(stream) == [], "other ranks send into it"
    assert run.pool.arrived is None
    num_sent = len(world.generated_at())
    for each in in_flight:
        with pytest.raises(ServerError, match=r"no server can generate: .*update to weights 1 failed: .*shapes differ"):
            world.run(each)
    world.advance(300.0)
    assert len(world.generated_at()) == num_sent
    assert run.sync.run(world.new_weights(2), "2").num_servers == 2
    assert run.pool.roster.reasons() == ""
    assert run.versions() == {2}
    run.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["differs", "lacks", "has more"])
def test_a_server_that_holds_something_else_is_found_out(world: World, method: Method, what: str) -> None:
    run = Run(world, method)

    def corrupt(machine: Machine) -> None:
        if what == "lacks":
            del machine.weights["b"]
        else:
            machine.weights["b" if what == "differs" else "x"] = "other"

    world.fault(1, "checksums", corrupt)
    words = {"differs": "1 tensors differ: b", "lacks": "are missing: b", "has more": "were not sent to it: x"}[what]
    with pytest.raises(CanaryError, match=rf"fake-1 .* does not hold the weights that were sent to it: .*{words}"):
        run.sync.run(world.new_weights(1), "1")
    assert run.pool.arrived is None
    with pytest.raises(RuntimeError, match=r"no server can generate: fake-0 .*update to weights 1 failed.*fake-1"):
        run.generate()
    world.machines[1].weights.pop("x", None)
    run.sync.run(world.new_weights(2), "2")
    assert run.versions() == {2}
    run.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["lacks a tensor", "has one twice", "breaks off"])
def test_a_stream_that_is_not_whole_ends_the_update_and_no_server_generates(
    world: World, method: Method, what: str
) -> None:
    run = Run(world, method)
    tensors = world.new_weights(1)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from tensors[:2]
        if what == "has one twice":
            yield tensors[0]
        elif what == "breaks off":
            raise OSError("rank 3 is gone")

    words = {"lacks a tensor": "lacks c", "has one twice": "a came twice", "breaks off": "rank 3 is gone"}[what]
    with pytest.raises((ValueError, OSError), match=words):
        run.sync.run(stream(), "1")
    with pytest.raises(RuntimeError, match=f"no server can generate: .*the update to weights 1 failed: .*{words}"):
        run.generate()
    run.sync.run(world.new_weights(2), "2")
    assert run.versions() == {2}
    run.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [1, 3, -2])
def test_when_no_server_survives_and_none_may_be_restarted_the_update_fails_with_each_ones_reason(
    world: World, method: Method, place: int
) -> None:
    run = Run(world, method, max_restarts=0)
    place %= len(ROUTES[method])
    for server in (0, 1):
        befall(world, server, method, place, die())
    with pytest.raises(ServerError, match=rf"(?s)no server survived the update: .*{world.urls[0]}.*{world.urls[1]}"):
        run.sync.run(world.new_weights(1), "1")
    with pytest.raises(RuntimeError, match="no server can generate"):
        run.generate()
    run.close()


@pytest.mark.parametrize("keeps_snapshot", [True, False])
def test_a_server_lost_in_an_update_comes_back_with_the_weights_of_that_or_of_the_next(
    world: World, keeps_snapshot: bool
) -> None:
    run = Run(world, keeps_snapshot=keeps_snapshot)
    befall(world, 1, "tensor", 3, die())
    run.sync.run(world.new_weights(1), "1")
    if keeps_snapshot:
        run.wait_until_all_are_back()
        assert run.pool.arrived is not None
        assert run.pool.arrived.folder is not None
        assert world.launched[-1].model_path == run.pool.arrived.folder.result()
        assert world.launched[-1].weight_version == "1"
    else:
        world.until(lambda: "it holds weights 'never synced', not '1'" in run.pool.roster.reasons())
        run.generate()
        assert set(world.generated_at()) == {0}
    run.sync.run(world.new_weights(2), "2")
    assert run.pool.roster.reasons() == ""
    assert run.versions() == {2}
    run.close()


@pytest.mark.parametrize("method", METHODS)
def test_a_server_whose_last_answer_is_lost_is_not_left_paused(world: World, method: Method) -> None:
    """It holds the new weights, and says so; but nobody has told it to go on."""
    run = Run(world, method)
    world.fault(1, "end_update, answered", unavailable())
    run.sync.run(world.new_weights(1), "1")
    run.wait_until_all_are_back()
    world.run(run.pool.set_stale(run.pool.servers[0], "so that it is the other one's turn"))
    assert run.versions() == {1}
    run.close()


def test_two_updates_fail_and_the_third_succeeds(world: World) -> None:
    run = Run(world)
    run.sync.run(world.new_weights(1), "1")
    for version, place in ((2, 3), (3, 5)):
        befall(world, version % 2, "tensor", place, refuse("no"))
        with pytest.raises(ServerError, match="500: no"):
            run.sync.run(world.new_weights(version), str(version))
        assert run.pool.arrived is not None
        assert run.pool.arrived.version == "1"
    run.sync.run(world.new_weights(4), "4")
    assert run.versions() == {4}
    run.close()


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_only_the_newest_snapshot_is_kept_and_a_failed_update_leaves_the_one_before(world: World) -> None:
    run = Run(world)
    for version in (1, 2):
        run.engine.update_weights(world.new_weights(version), version)
        assert [folder.name for folder in (world.folder / "snapshots").iterdir()] == [f"version-{version}"]
    world.fault(0, "load_bucket", refuse("no"))
    with pytest.raises(ServerError, match="500: no"):
        run.engine.update_weights(world.new_weights(3), 3)
    assert (world.folder / "snapshots" / "version-2").is_dir()
    run.engine.update_weights(world.new_weights(3), 3)
    world.machines[0].end(1)
    world.until(lambda: run.pool.num_restarts and not run.pool.roster.reasons())
    assert run.versions() == {3}
    run.close()


def snapshots_of(world: World) -> list[str]:
    place = world.folder / "snapshots"
    return [folder.name for folder in place.iterdir()] if place.exists() else []


@pytest.mark.parametrize("method", ["tensor", "distributed"])
def test_the_disk_does_not_hold_up_an_update_and_a_server_that_died_waits_for_the_whole_snapshot(
    world: World, method: Method
) -> None:
    run = Run(world, method)
    world.disk.is_held = True
    run.engine.update_weights(world.new_weights(1), 1)
    assert snapshots_of(world) == []
    assert run.versions() == {1}
    world.machines[1].end(1)
    world.until(lambda: run.pool.num_restarts)
    world.advance(100.0)
    assert len(world.launched) == 2
    assert run.versions() == {1}, "the other one goes on"
    world.begin(let_go_on(world))
    run.wait_until_all_are_back()
    assert snapshots_of(world) == ["version-1"]
    assert world.launched[2].model_path == world.folder / "snapshots" / "version-1"
    assert world.machines[1].weights == world.whole["1"]
    world.run(run.pool.set_stale(run.pool.servers[0], "so that it is the other one's turn"))
    assert run.versions() == {1}
    run.close()


async def let_go_on(world: World) -> None:
    """The disk, in the midst of all else."""
    world.disk.go_on()


def test_a_server_that_waits_for_a_snapshot_as_the_run_ends_does_not_end_its_writing(world: World) -> None:
    run = Run(world)
    world.disk.is_held = True
    run.engine.update_weights(world.new_weights(1), 1)
    world.machines[1].end(1)
    world.until(lambda: run.pool.num_restarts)
    run.close()
    assert snapshots_of(world) == ["version-1"]


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_cannot_be_written_are_told_with_the_next_update_or_at_the_end(
    world: World, method: Method
) -> None:
    run, place = Run(world, method), world.folder / "snapshots"
    place.write_text("a file is in its place")
    words = rf"could not be written to {place}: .*servers\.snapshot_dir"
    if method == "disk":
        with pytest.raises(ServerError, match=words):
            run.engine.update_weights(world.new_weights(1), 1)
        run.close()  # it has been told
        return
    run.engine.update_weights(world.new_weights(1), 1)
    with pytest.raises(ServerError, match=words):
        run.engine.update_weights(world.new_weights(2), 2)
    assert run.versions() == {1}, "no server was touched"
    run.engine.update_weights(world.new_weights(2), 2)
    with pytest.raises(DiskError, match=words):
        run.close()
    assert not asyncio.all_tasks(world.loop)
    world.expect_sound()


def test_a_server_whose_snapshot_could_not_be_written_is_lost_with_the_reason(world: World) -> None:
    run, place = Run(world), world.folder / "snapshots"
    place.write_text("a file is in its place")
    run.engine.update_weights(world.new_weights(1), 1)
    world.machines[1].end(1)
    world.until(lambda: f"could not be written to {place}" in run.pool.roster.reasons())
    assert run.versions() == {1}
    with pytest.raises(DiskError, match="could not be written"):
        run.close()
    world.expect_sound()


def test_what_the_disk_takes_is_a_time_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by a second whenever it is asked, and by a hundred for each file."""
    run, clock = Run(world), itertools.count()
    monkeypatch.setattr(sync, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def write(*arguments: Any, **keywords: Any) -> None:
        for _ in range(100):
            next(clock)

    monkeypatch.setattr(snapshots, "save_file", write)

    def wait(futures: object) -> None:
        world.disk.go_on()
        world.disk.is_held = True

    monkeypatch.setattr(backlog, "wait", wait)
    world.disk.is_held = True
    reports = [run.sync.run(world.new_weights(version), str(version)) for version in (1, 2)]
    assert [report.transfer_s for report in reports] == [1.0, 1.0]
    assert [report.snapshot_wait_s for report in reports] == [1.0, 301.0]
    assert reports[1].metrics()["weight_sync/snapshot_wait_s"].value() == 301.0
    assert "weight_sync/snapshot_wait_s" not in replace(reports[1], snapshot_wait_s=None).metrics()
    run.close()


@pytest.mark.parametrize("method", METHODS)
def test_closing_after_an_update_that_failed_ends_everything(world: World, method: Method) -> None:
    run = Run(world, method)
    befall(world, 0, method, len(ROUTES[method]) - 3, refuse("no"))
    sync_of_run: WeightSync = run.sync
    with pytest.raises(ServerError):
        sync_of_run.run(world.new_weights(1), "1")
    run.close()
    assert all(meeting.has_been_left for meeting in world.meetings.values())
