"""Servers that share GPUs with the trainer: who packs for whom, and who has which memory when.

The trainer's ranks and the servers are processes; GPUs and SGLang are fakes that refuse what the real ones refuse. Each
test of what holds has a twin in which it is broken, and fails.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.colocated.fake_gpus import FakeGpus
from tests.colocated.forking_python import forking_python
from tests.colocated.training import CAPACITY_IN_MODELS, STATE, WEIGHTS, Case, model_bytes, run
from tests.models import save_random_model
from tests.parallel.ranks import RankError, run_ranks

MEMORY_FRACTION = 0.8
"""The default of servers.memory_fraction."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9 MiB, so that there are several buckets of one MiB."""
    return save_random_model(
        tmp_path_factory.mktemp("models") / "qwen2", hidden_size=256, intermediate_size=512, tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def python() -> Iterator[Path]:
    """By which servers are started."""
    with tempfile.TemporaryDirectory(prefix="fipo-") as folder, forking_python(Path(folder)) as path:
        yield path


class Runs:
    """Runs of one test, each with GPUs of its own."""

    def __init__(self, model: Path, python: Path, folder: Path) -> None:
        self.model, self._python, self._folder = model, python, folder
        self.gpus: FakeGpus

    def run(self, case: Case) -> list[dict[str, Any]]:
        names = [str(gpu) for gpu in range(max(case.num_ranks, case.num_servers * case.tp))]
        self.gpus = FakeGpus.create(
            self._folder / "gpus.json", names, int(CAPACITY_IN_MODELS * model_bytes(self.model))
        )
        paths = str(self.model), str(self._python), str(self._folder)
        return run_ranks(run, case.num_ranks, case, *paths, timeout_s=150)

    def cache_beside(self, held: int) -> int:
        """What a server of one GPU sizes its cache to where so many bytes are held already: SGLang's rule."""
        weights = model_bytes(self.model)
        free = int(CAPACITY_IN_MODELS * weights) - held
        return int(free - weights - (1 - MEMORY_FRACTION) * free)


@pytest.fixture
def runs(model: Path, python: Path, tmp_path: Path) -> Runs:
    return Runs(model, python, tmp_path)


@pytest.mark.parametrize(
    ("num_ranks", "num_servers", "tp", "first_gpu"),
    [(2, 2, 1, 0), (4, 2, 2, 0), (2, 1, 2, 0), (2, 1, 1, 0), (2, 1, 1, 1)],
)
def test_every_server_rank_is_handed_memory_of_its_own_gpu(
    runs: Runs, num_ranks: int, num_servers: int, tp: int, first_gpu: int
) -> None:
    results = runs.run(Case(num_ranks=num_ranks, num_servers=num_servers, tp=tp, first_gpu=first_gpu))
    assert results[0]["versions"] == [["0"] * num_servers, ["1"] * num_servers]
    assert results[0]["restarts"] == [0] * num_servers
    assert all(result["versions"] == [[], []] for result in results[1:]), "the node's first rank owns the servers"
    opened = Counter((event["by"], event["on"]) for event in runs.gpus.events("opened"))
    assert {by for by, _ in opened} == {str(gpu) for gpu in range(first_gpu, first_gpu + num_servers * tp)}
    made = Counter(event["of"] for event in runs.gpus.events("handle"))
    assert made == Counter(event["on"] for event in runs.gpus.events("opened")), "each is opened, once"
    assert all(by == on for by, on in opened)
    assert len(set(opened.values())) == 1, "every rank gets every bucket once"
    assert min(opened.values()) >= 2 * 8, "two updates of eight buckets or more"


def test_a_handle_of_the_owners_gpu_ends_the_other_server(runs: Runs) -> None:
    """What a trainer does that packs on its first rank's GPU alone."""
    results = runs.run(Case(breaks="own_gpu", num_steps=1))
    assert results[0]["versions"] == [["0"]], "one of two servers is left"


READS_SLOWLY = {"FAKE_READ_S": "0.2"}
"""Servers that are at a bucket while the next ones are packed."""


def test_no_buffer_is_written_while_a_server_reads_it(runs: Runs) -> None:
    """On no rank: those that own no servers hear of what has arrived from the one that does."""
    results = runs.run(Case(num_steps=1, environment=READS_SLOWLY))
    assert results[0]["versions"] == [["0", "0"]], "checksums agree"


def test_a_buffer_that_is_written_too_early_is_noticed(runs: Runs) -> None:
    with pytest.raises(RankError, match="does not hold the weights that were sent to it"):
        runs.run(Case(num_steps=1, breaks="settle", environment=READS_SLOWLY))


def test_servers_size_their_caches_by_what_is_free_while_they_generate(runs: Runs) -> None:
    runs.run(Case(num_steps=1))
    assert [event["cache"] for event in runs.gpus.events("sized")] == [runs.cache_beside(0)] * 2


def test_a_cache_sized_beside_the_actor_is_smaller(runs: Runs) -> None:
    runs.run(Case(num_steps=1, breaks="lending"))
    held = sum(int(models * model_bytes(runs.model)) for models in (WEIGHTS, STATE))
    assert [event["cache"] for event in runs.gpus.events("sized")] == [runs.cache_beside(held)] * 2
    assert runs.cache_beside(held) < 0.65 * runs.cache_beside(0)


def test_an_updates_caches_go_back_before_servers_take_memory(runs: Runs) -> None:
    with pytest.raises(RankError, match="no server is left"):
        runs.run(Case(breaks="caches"))
    log = (runs.gpus.path.parent / "servers/rank-0/sglang-0.log").read_text()
    assert "CUDA out of memory: server" in log
    assert "'actor:activations'" in log


def test_no_server_takes_memory_before_every_rank_has_given_it(runs: Runs) -> None:
    """The rank that owns the servers is ahead of the one beside it."""
    results = runs.run(Case(slow_ranks=(1,)))
    assert results[0]["restarts"] == [0, 0]
    assert [event["cache"] for event in runs.gpus.events("sized")] == [runs.cache_beside(0)] * 2


def test_a_server_that_does_not_wait_for_the_ranks_takes_less(runs: Runs) -> None:
    with contextlib.suppress(RankError):
        runs.run(Case(slow_ranks=(1,), num_steps=1, breaks="together"))
    assert min(event["cache"] for event in runs.gpus.events("sized")) < runs.cache_beside(0)


PROBED: dict[str, Any] = {"health_interval_s": 0.05, "environment": {"FAKE_PROBE_S": "1"}, "waits_for_probe": True}
"""A question after the servers' health is under way whenever they are asked for their memory."""


def test_no_question_after_a_servers_health_meets_the_release_of_its_memory(runs: Runs) -> None:
    results = runs.run(Case(num_steps=3, **PROBED))
    assert results[0]["versions"] == [[str(step)] * 2 for step in range(3)]
    assert results[0]["restarts"] == [0, 0]
    assert len(runs.gpus.events("released")) == 2 * 4


def test_a_server_that_is_asked_for_its_memory_while_it_works_dies(runs: Runs) -> None:
    with contextlib.suppress(RankError):  # raised where both die
        runs.run(Case(num_steps=1, breaks="idle", **PROBED | {"environment": {"FAKE_PROBE_S": "8"}}))
    logs = "".join(log.read_text() for log in (runs.gpus.path.parent / "servers/rank-0").glob("*.log"))
    assert "release_memory_occupation should be called only when server is idle" in logs


def test_generation_that_goes_on_before_its_cache_has_memory_ends_a_server(runs: Runs) -> None:
    with pytest.raises(RankError, match="no server is left"):
        runs.run(Case(num_steps=1, breaks="order"))
    logs = "".join(log.read_text() for log in (runs.gpus.path.parent / "servers/rank-0").glob("*.log"))
    assert "generation goes on while the memory of ['kv_cache'] is unmapped" in logs


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ("handle", "failed on another rank of this node: GPU 1: no memory is left"),
        ("refuse", "wants no weights"),
    ],
)
def test_whoever_fails_in_an_update_ends_it_for_all_at_once(runs: Runs, breaks: str, words: str) -> None:
    """The rank that packs along, and the one that owns the servers."""
    with pytest.raises(RankError, match=words):
        runs.run(Case(breaks=breaks, num_steps=1))


DYING: dict[str, Any] = {"environment": {"FAKE_DIES_AT_BUCKET": "3"}, "slow_ranks": (0, 1)}
"""One of two servers dies in the first update, and the actor's memory is not lent for a while yet."""


@pytest.mark.parametrize("keeps_snapshot", [True, False])
def test_a_server_that_dies_in_an_update_starts_again_when_there_is_memory(runs: Runs, keeps_snapshot: bool) -> None:
    results = runs.run(Case(num_steps=3, keeps_snapshot=keeps_snapshot, **DYING))
    assert sorted(results[0]["restarts"]) == [0, 1]
    assert results[0]["versions"][-1] == ["2", "2"], "both generate in the end"
    assert [event["cache"] for event in runs.gpus.events("sized")] == [runs.cache_beside(0)] * 3


def test_a_server_that_starts_again_at_once_takes_less(runs: Runs) -> None:
    with contextlib.suppress(RankError):
        runs.run(Case(num_steps=1, breaks="restart", **DYING))
    *_, again = runs.gpus.events("sized")
    assert again["cache"] < runs.cache_beside(0)
