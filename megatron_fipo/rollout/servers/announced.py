"""Servers of a run that others have started: how each is announced in the run's folder, and how that ends.

    servers/joined/NAME.json        a server that runs: its address, its key, what it serves
    servers/joined/NAME.given-up    the same, once the run has given it up: why, and whether for good
    servers/joined/finished         the run is finished and needs none of them any more

Who starts a server writes the first of these files and takes it away when the server is to leave; the run renames it.
The files hold keys and are trusted, so only this user may have written them, and only this user may read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.system.disk import put_file_in_place, write_text_whole, writing

_ANNOUNCED, _GIVEN_UP, _FINISHED = ".json", ".given-up", "finished"


@dataclass(frozen=True)
class Announced:
    """A server that others have started.

    Attributes:
        name: unique among all that are ever announced to a run.
        host, port: where it listens.
        key: shown with every request.
        serves: engine, dtype, tensor-parallel size and shape of the model, which must be the run's.
    """

    name: str
    host: str
    port: int
    serves: dict[str, Any]
    key: str = field(repr=False)


@dataclass(frozen=True)
class GivenUp:
    """Why a run has given a server up.

    Attributes:
        reason: for people.
        for_good: whether it would be given up again if it were started anew.
    """

    reason: str
    for_good: bool


class AnnouncedServers:
    """The folder of the announcements, as a run sees it and as those do who start servers for it.

    Args:
        folder: the run's folder `servers`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "joined"

    # --- who starts servers -------------------------------------------------------------------------------------------

    def announce(self, server: Announced) -> None:
        """Announce a server that takes weights and requests.

        Raises:
            DiskError: if it cannot be written.
        """
        path = self._path(server.name, _ANNOUNCED)
        with writing(path):
            self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            unfinished = path.with_suffix(".partial")
            with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(asdict(server), file)
            put_file_in_place(unfinished, path)

    def withdraw(self, name: str) -> None:
        """Take back what was announced, so that the run lets the server go; what the run said of it is deleted, too."""
        for suffix in (_ANNOUNCED, _GIVEN_UP):
            self._path(name, suffix).unlink(missing_ok=True)

    def given_up(self, name: str) -> GivenUp | None:
        """Whether the run has given a server up, and why."""
        try:
            return GivenUp(**json.loads(self._path(name, _GIVEN_UP).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    @property
    def is_finished(self) -> bool:
        """Whether the run is finished."""
        return (self.folder / _FINISHED).exists()

    # --- the run ------------------------------------------------------------------------------------------------------

    def read(self) -> tuple[list[Announced], list[str]]:
        """All servers that are announced now, by name, and what is wrong with files that announce none."""
        found, problems = [], []
        for path in sorted(self.folder.glob(f"*{_ANNOUNCED}")):
            try:
                found.append(_read(path))
            except FileNotFoundError:
                continue  # it was withdrawn just now
            except (OSError, ValueError) as error:
                problems.append(f"{path} is passed over: {error}")
        return found, problems

    def is_announced(self, name: str) -> bool:
        """Whether a server is announced now."""
        return self._path(name, _ANNOUNCED).exists()

    def give_up(self, name: str, reason: str, *, for_good: bool) -> None:
        """Say that the run does not use a server any more.

        Raises:
            DiskError: if that cannot be written.
        """
        write_text_whole(self._path(name, _GIVEN_UP), json.dumps(asdict(GivenUp(reason, for_good))))
        with writing(self.folder):
            self._path(name, _ANNOUNCED).unlink(missing_ok=True)

    def set_finished(self, is_finished: bool) -> None:
        """Say whether the run needs servers any more. Nothing is written where none was ever announced.

        Raises:
            DiskError: if it cannot be written.
        """
        with writing(self.folder):
            if not is_finished:
                (self.folder / _FINISHED).unlink(missing_ok=True)
            elif self.folder.is_dir():
                (self.folder / _FINISHED).touch()

    def _path(self, name: str, suffix: str) -> Path:
        return self.folder / f"{name}{suffix}"


def share_out(servers: Sequence[Announced], owner_of: dict[str, int], num_owners: int) -> dict[str, int]:
    """Which owner, by number, takes in which server: each stays where it is, a new one goes where there are fewest."""
    now = {server.name: owner_of[server.name] for server in servers if server.name in owner_of}
    for server in servers:
        if server.name not in now:
            counts = [list(now.values()).count(owner) for owner in range(num_owners)]
            now[server.name] = counts.index(min(counts))
    return now


def _read(path: Path) -> Announced:
    """
    Raises:
        ValueError: if it may be somebody else's, or is none.
    """
    with path.open(encoding="utf-8") as file:
        stat = os.fstat(file.fileno())
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
            raise ValueError(
                f"it belongs to user {stat.st_uid} and has mode {stat.st_mode & 0o777:o}; it must belong to this user "
                f"({os.geteuid()}), and nobody else may read or write it (mode 600)."
            )
        try:
            found = Announced(**json.load(file))
            kinds = (found.name, str), (found.host, str), (found.port, int), (found.serves, dict), (found.key, str)
            if not all(type(value) is kind for value, kind in kinds) or found.name != path.stem:
                raise TypeError("a value is of another kind, or the name is not the file's")
        except (TypeError, ValueError) as error:
            raise ValueError(f"it announces no server ({error}). Delete it.") from error
    return found
