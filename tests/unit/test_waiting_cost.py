"""What waiting for each other costs the store that all ranks share: the same for every rank, however many there are."""

from __future__ import annotations

import threading
from collections import defaultdict
from unittest import mock

import pytest

from megatron_fipo.parallel import waiting
from megatron_fipo.parallel.waiting import OtherRankError, Work


class Rank:
    """What `Work` asks of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class CountingStore:
    """A store of one process, which notes what each rank asks for. Ranks are threads named by their number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int | bytes] = {}
        self.asked_by: dict[str, list[tuple[str, str]]] = defaultdict(list)

    def _note(self, operation: str, key: str) -> None:
        self.asked_by[threading.current_thread().name].append((operation, key))

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            self._note("add", key)
            total = int(self._values.get(key, 0)) + amount
            self._values[key] = total
            return total

    def check(self, keys: list[str]) -> bool:
        with self._lock:
            self._note("check", keys[0])
            return all(key in self._values for key in keys)

    def get(self, key: str) -> bytes:
        with self._lock:
            self._note("get", key)
            value = self._values[key]
            assert isinstance(value, bytes)
            return value

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        with self._lock:
            self._note("compare_set", key)
            assert expected == "", "nothing that is there is replaced"
            value = self._values.setdefault(key, desired.encode())
            assert isinstance(value, bytes)
            return value


def work(size: int, num_working: int, failing: int | None = None) -> tuple[CountingStore, dict[int, str]]:
    """Ranks of which the first few work until all others wait; the store, and the errors by rank."""
    store, errors = CountingStore(), {}
    release, all_wait = threading.Event(), threading.Barrier(size - num_working + 1)

    def one(rank: int) -> None:
        piece = Work(Rank(rank, size), "made work")  # type: ignore[arg-type]
        piece._prefix = "made"  # ranks are processes elsewhere, and count their pieces of work each for itself
        try:
            with piece:
                if rank < num_working:
                    release.wait()
                    if rank == failing:
                        raise ValueError("no more room")
                else:
                    all_wait.wait()
        except (OtherRankError, ValueError) as error:
            errors[rank] = f"{type(error).__name__}: {error}"

    with mock.patch.object(waiting, "_get_default_store", return_value=store):
        threads = [threading.Thread(target=one, args=(rank,), name=str(rank)) for rank in range(size)]
        for thread in threads:
            thread.start()
        all_wait.wait()
        release.set()
        for thread in threads:
            thread.join()
    return store, errors


@pytest.mark.parametrize("size", [4, 64, 256])
def test_a_rank_looks_at_as_few_keys_however_many_ranks_there_are(size: int) -> None:
    store, errors = work(size, num_working=2)
    assert errors == {}
    for rank in range(size):
        keys = {key for _, key in store.asked_by[str(rank)]}
        assert keys <= {"made/done", "made/failed", f"made/beats/{rank}"}, "a rank's own heart, and what all share"
    assert store.add("made/done", 0) == size


def test_the_heartbeat_listens_to_one_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BEAT_S", 0.01)
    heard = threading.Event()
    store = CountingStore()
    add = store.add

    def adding(key: str, amount: int) -> int:
        if threading.current_thread().name == "heartbeat" and not amount:
            heard.set()
        return add(key, amount)

    store.add = adding  # type: ignore[method-assign]
    piece = Work(Rank(5, 64), "made work")  # type: ignore[arg-type]
    piece._prefix = "made"
    store.add("made/done", 63)
    with mock.patch.object(waiting, "_get_default_store", return_value=store), piece:
        assert heard.wait(60)
    asked = {key for _, key in store.asked_by["heartbeat"]}
    assert asked <= {"made/beats/5", "made/beats/4", "made/failed"}


def test_the_first_failure_is_the_one_that_all_hear_of() -> None:
    store, errors = work(16, num_working=3, failing=1)
    assert errors[1] == "ValueError: no more room"
    assert {errors[rank] for rank in range(16) if rank != 1} == {
        "OtherRankError: made work: rank 1 failed: ValueError: no more room"
    }
    store.compare_set("made/failed", "", "another")
    assert store.get("made/failed") == b"rank 1 failed: ValueError: no more room"
