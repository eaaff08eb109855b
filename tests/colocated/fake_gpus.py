"""GPUs that exist only as a ledger of who holds how much of each, in a file that several processes share.

Whoever holds more than there is left runs out of memory, as on a real one. What matters happened in which order is
noted beside it.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class OutOfGpuMemoryError(RuntimeError):
    """More was asked for than is free."""


class FakeGpus:
    """The ledger in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, names: Sequence[str], capacity: int) -> FakeGpus:
        """So many bytes on each."""
        path.write_text(json.dumps({"capacity": capacity, "held": {name: {} for name in names}, "events": []}))
        return cls(path)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        with self.path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = json.load(file)
            yield content
            file.seek(0)
            file.truncate()
            json.dump(content, file)

    def hold(self, gpu: str, who: str, num_bytes: int) -> None:
        """Hold so many bytes from now on, whatever it was before."""
        with self._locked() as content:
            held = content["held"][gpu]
            free = content["capacity"] - sum(held.values()) + held.get(who, 0)
            if num_bytes > free:
                raise OutOfGpuMemoryError(
                    f"CUDA out of memory: {who} asks for {num_bytes} bytes of GPU {gpu}, {free} are free; held: {held}"
                )
            held[who] = num_bytes

    def held(self, gpu: str) -> dict[str, int]:
        """Who holds how much."""
        with self._locked() as content:
            return {who: num_bytes for who, num_bytes in content["held"][gpu].items() if num_bytes}

    def free(self, gpu: str) -> int:
        """Bytes that nobody holds."""
        with self._locked() as content:
            return int(content["capacity"] - sum(content["held"][gpu].values()))

    def forget(self, who: str) -> None:
        """A process has ended."""
        with self._locked() as content:
            for held in content["held"].values():
                for name in [name for name in held if name.startswith(who)]:
                    del held[name]

    def note(self, **event: Any) -> None:
        """Note that something happened."""
        with self._locked() as content:
            content["events"].append(event)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What was noted of one kind, in order."""
        with self._locked() as content:
            return [event for event in content["events"] if event["kind"] == kind]
