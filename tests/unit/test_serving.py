"""Who starts servers for a run that another process trains: how they are kept, announced and ended; all are played."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fipo import cli
from megatron_fipo.config import ServersSection
from megatron_fipo.rollout.servers.announced import Announced, AnnouncedServers
from megatron_fipo.rollout.servers.api import LaunchSpec
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.serving import Serving
from tests.unit.fake_servers import FakeAdapter, die
from tests.unit.server_world import World

SERVES = {"what": "it serves"}


class Command:
    """The command, and the run's folder."""

    def __init__(self, world: World, num_servers: int = 1, max_restarts: int = 2) -> None:
        self.world, self.said = world, list[str]()
        self.announced = AnnouncedServers(world.folder / "servers")
        specs = [
            LaunchSpec("python", world.base, world.host, port, "float32", "0") for port in world.ports[:num_servers]
        ]
        self.serving = Serving(
            FakeAdapter(world),
            specs,
            ServersSection(max_restarts=max_restarts, start_timeout_s=30.0),
            SERVES,
            self.announced,
            world.folder / "logs",
            self.said.append,
            start_process=world.start_process,
        )
        self.task: asyncio.Task[None] = world.begin(self.serving.run())

    def until_announced(self, *but: str) -> Announced:
        """The first server that is announced, but for some."""

        def found() -> list[Announced]:
            return [server for server in self.announced.read()[0] if server.name not in but]

        self.world.until(found)
        return found()[0]

    def stop(self) -> None:
        self.world.call(self.serving.stop)
        self.world.run(self.task)
        self.world.expect_sound()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_servers_are_announced_when_they_are_up_and_withdrawn_before_they_end(world: World) -> None:
    command = Command(world, num_servers=2)
    world.advance(1.0)
    assert command.announced.read() == ([], []), "they are starting"
    world.until(lambda: len(command.announced.read()[0]) == 2)
    first, second = command.announced.read()[0]
    assert sorted([first.port, second.port]) == sorted(world.ports)
    assert first.serves == second.serves == SERVES
    assert {first.key, second.key} == {spec.key for spec in world.launched}
    assert len({first.key, second.key, ""}) == 3
    there = []
    ask_to_end = type(world.processes[0]).ask_to_end
    for process in world.processes:
        process.ask_to_end = lambda one=process: (there.append(command.announced.read()[0]), ask_to_end(one))  # type: ignore[method-assign]
    command.stop()
    assert there[0] in ([], [first], [second])
    assert there[-1] == []
    assert list(command.announced.folder.iterdir()) == []


def test_one_that_ends_is_started_anew_under_another_name_and_key(world: World) -> None:
    command = Command(world)
    first = command.until_announced()
    world.machines[0].end(1, "out of memory")
    second = command.until_announced(first.name)
    assert second.key != first.key
    assert not command.announced.is_announced(first.name)
    assert "out of memory" in command.said[1]
    command.stop()


def test_one_that_the_run_gives_up_is_started_anew(world: World) -> None:
    command = Command(world)
    first = command.until_announced()
    command.announced.give_up(first.name, "it did not answer", for_good=False)
    second = command.until_announced(first.name)
    assert len(world.launched) == 2
    assert "it did not answer" in command.said[1]
    assert command.announced.given_up(first.name) is None, "it was heard"
    command.stop()
    assert second.name != first.name


def test_one_that_ends_too_often_ends_the_command_with_its_words(world: World) -> None:
    command = Command(world, num_servers=2, max_restarts=1)
    world.boots[1] += [None, die("no such device")]
    world.until(lambda: len(command.announced.read()[0]) == 2)
    world.machines[1].end(1, "first end")
    with pytest.raises(ServerError, match="no such device"):
        world.run(command.task)
    world.expect_sound()
    assert list(command.announced.folder.iterdir()) == []


def test_restarts_are_counted(world: World) -> None:
    command = Command(world, max_restarts=1)
    first = command.until_announced()
    world.machines[0].end(1)
    command.until_announced(first.name)
    world.machines[0].end(1, "the last end")
    with pytest.raises(ServerError, match=r"(?s)the last end.*restarted 1 times: servers\.max_restarts"):
        world.run(command.task)
    world.expect_sound()


def test_one_that_is_of_no_use_ends_the_command_with_the_runs_words(world: World) -> None:
    command = Command(world)
    name = command.until_announced().name
    command.announced.give_up(name, "it serves another model", for_good=True)
    with pytest.raises(ServerError, match=f"the run has no use for {name}: it serves another model"):
        world.run(command.task)
    world.expect_sound()


def test_the_end_of_the_run_ends_the_command(world: World) -> None:
    command = Command(world, num_servers=2)
    command.until_announced()
    command.announced.set_finished(True)
    world.run(command.task)
    assert command.said[-1] == "the run is finished"
    world.expect_sound()


def test_where_the_runs_folder_is_moved_away_servers_are_announced_again(world: World) -> None:
    """As train.resume=false does."""
    command = Command(world)
    first = command.until_announced()
    shutil.move(command.announced.folder.parent, world.folder / "before")
    assert command.until_announced() == first
    assert len(world.launched) == 1
    command.stop()


def test_one_that_does_not_come_up_is_an_error(world: World) -> None:
    world.boots[0].append(die("ValueError: no such model"))
    command = Command(world)
    with pytest.raises(ServerError, match="no such model"):
        world.run(command.task)
    world.expect_sound()
    assert not command.announced.folder.exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engine=in_process", "rollout.engine=in_process: the run has no servers"),
        ("servers.router=true", "servers.router=true"),
    ],
)
def test_a_configuration_that_nobody_can_join_is_refused(
    override: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = "rollout.engine=sglang"
    status = cli.main(["serve", "examples/quickstart/fipo.yaml", f"run.output_dir={tmp_path}", engine, override])
    assert status == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
