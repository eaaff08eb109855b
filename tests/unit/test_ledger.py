"""Judged responses on disk: given back as they were, whoever wrote them, and never half a line or a changed one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.rl.trajectory import Prompt, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.ledger import Plan, RolloutLedger
from megatron_fipo.rollout.ledger_lines import line_of, read_lines, response_record
from megatron_fipo.system.disk import DiskError

PROMPTS = [Prompt(number, "sums", f"{number}+1=", (5, number), "exact", str(number + 1)) for number in range(4)]


def ledger(folder: Path, rank: int = 0, fingerprint: str = "one") -> RolloutLedger:
    return RolloutLedger(folder, rank, fingerprint, decode=lambda ids: " ".join(map(str, ids)))


def sample(prompt_id: int, index: int) -> Trajectory:
    return Trajectory.of_response(
        prompt_id=prompt_id,
        sample_index=index,
        prompt_ids=torch.tensor([5, prompt_id]),
        response_ids=torch.tensor([151_643, 7, index]),
        rollout_log_probs=torch.tensor([-1 / 3, -1e-30, -17.25]) * (index + 1),
        finish_reason="stop",
        policy_versions=[(3, 0, 2), (4, 2, 3)],
        source="sums",
        response_text=f"151643 7 {index}",
        accuracy=0.1,
        answer="½",
        error="",
        parts={"judges:format": 0.25},
    )


def same(one: Trajectory, other: Trajectory) -> bool:
    ours, theirs = (flat(vars(sample) | {"segments": list(map(vars, sample.segments))}) for sample in (one, other))
    return ours == theirs


def flat(value: Any) -> Any:
    """The value with its tensors as dtype and numbers, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {name: flat(each) for name, each in value.items()}
    return [flat(each) for each in value] if isinstance(value, list) else value


def write(folder: Path, rank: int, step: int, prompt_ids: list[int]) -> None:
    book = ledger(folder, rank)
    book.finished(step, 0, PROMPTS)
    for prompt_id in prompt_ids:
        for index in range(2):
            book.append(0, sample(prompt_id, index))
    book.secure()
    book.close()


def test_what_was_recorded_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path, 0, 7, [0, 2])
    write(tmp_path, 1, 7, [1])
    for rank in range(3):  # a rank of the next run reads what all ranks of the last one wrote
        found = ledger(tmp_path, rank).finished(7, 0, PROMPTS)
        assert set(found) == {("sums", prompt_id, index) for prompt_id in (0, 1, 2) for index in range(2)}
        assert all(same(value, sample(key[1], key[2])) for key, value in found.items())


def test_only_what_was_asked_for_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 0, 7, [0, 2])
    book = ledger(tmp_path)
    assert set(book.finished(7, 0, PROMPTS[2:])) == {("sums", 2, 0), ("sums", 2, 1)}
    assert book.finished(7, 1, PROMPTS) == {}, "another round"
    assert book.finished(8, 0, PROMPTS) == {}, "another step"
    other = [Prompt(0, "products", "0*1=", (5, 0), "exact", "0")]
    assert book.finished(7, 0, other) == {}, "another source"


def test_a_killed_process_may_tear_the_last_line(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, [0, 1])
    path = tmp_path / "step_000000" / "rank_000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    book = ledger(tmp_path)
    assert ("sums", 1, 1) not in book.finished(0, 0, PROMPTS)
    book.append(0, sample(1, 1))  # the torn line is gone, and what follows it is whole
    assert path.read_bytes() == whole
    assert len(ledger(tmp_path).finished(0, 0, PROMPTS)) == 4


@pytest.mark.parametrize("line", [1, 3])
def test_a_changed_line_is_an_error(tmp_path: Path, line: int) -> None:
    write(tmp_path, 0, 0, [0, 1])
    path = tmp_path / "step_000000" / "rank_000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b"0", b"1", 1)
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"rank_000.jsonl, line {line} is not what was written there"):
        ledger(tmp_path).finished(0, 0, PROMPTS)


def test_old_and_foreign_steps_go(tmp_path: Path) -> None:
    for step in range(4):
        write(tmp_path, 0, step, [0])
    ledger(tmp_path).forget_before(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]
    assert ledger(tmp_path).discard_others() == 0
    assert ledger(tmp_path, fingerprint="two").discard_others() == 2
    assert list(tmp_path.iterdir()) == []


@contextmanager
def disk_with_room_for(path: Path, num_bytes: int) -> Iterator[None]:
    """The file may grow by so many bytes: a write is cut short first, and refused then, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.finished(0, 0, PROMPTS)
    book.append(0, sample(0, 0))
    path = tmp_path / "step_000000" / "rank_000.jsonl"
    whole = path.read_bytes()
    with disk_with_room_for(path, 40):
        with path.open("ab", buffering=0) as probe:  # this is what the ledger has to cope with
            assert probe.write(b"x" * 100) == 40
        os.truncate(path, len(whole))
        with pytest.raises(
            DiskError, match=r"rank_000\.jsonl cannot be written: File too large .*free there"
        ) as caught:
            book.append(0, sample(0, 1))
    assert "start the same command again: it goes on from the newest checkpoint" in str(caught.value)
    assert path.read_bytes() == whole, "nothing of the line that did not fit is left"
    for index in range(2):  # somebody has made room
        book.append(0, sample(1, index))
    assert set(ledger(tmp_path).finished(0, 0, PROMPTS)) == {("sums", 0, 0), ("sums", 1, 0), ("sums", 1, 1)}


def test_a_deleted_file_is_noticed(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.finished(0, 0, PROMPTS)
    shutil.rmtree(tmp_path / "step_000000")
    with pytest.raises(DiskError, match="was deleted or replaced while the run was writing there"):
        book.append(0, sample(0, 0))


def test_whatever_a_verifier_answered_comes_back(tmp_path: Path) -> None:
    answers = ["\ud800", "a\udfffb", "\x00\x1b[31m", "\u2028\x85\r\n", "4²", '"\\']
    book = ledger(tmp_path)
    book.finished(0, 0, PROMPTS)
    for index, answer in enumerate(answers):
        odd = sample(0, index)
        odd.answer = odd.error = answer
        book.append(0, odd)
    found = ledger(tmp_path).finished(0, 0, PROMPTS)
    assert [found["sums", 0, index].answer for index in range(len(answers))] == answers
    assert [found["sums", 0, index].error for index in range(len(answers))] == answers


NO_ROUND = json.dumps(response_record(sample(0, 0)))


@pytest.mark.parametrize(
    "text", ["[]", "7", NO_ROUND, '{"round": 0}', '{"round": 0, "response_ids": "!"}', "{", "[" * 100_000]
)
def test_a_line_that_is_whole_and_holds_something_else_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, 0, 0, [0])
    path = tmp_path / "step_000000" / "rank_000.jsonl"
    with path.open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode()))
    with pytest.raises(ValueError, match=r"rank_000\.jsonl, line 4 is not what was written there \(it "):
        ledger(tmp_path).finished(0, 0, PROMPTS)


def test_steps_that_are_past_stay(tmp_path: Path) -> None:
    for step in range(4):
        write(tmp_path, 0, step, [0])
    (tmp_path / "step_abc").mkdir()
    assert ledger(tmp_path, fingerprint="two").discard_others(first_step=2) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000", "step_000001", "step_abc"]
    ledger(tmp_path).forget_before(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_abc"]


# --- what a step trains on --------------------------------------------------------------------------------------------


def test_a_plan_comes_back_and_another_one_replaces_it_before_any_update(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    assert book.plan(3) is None
    book.note_plan(3, Plan([4, 6], 7), must_be_same=False)
    assert ledger(tmp_path, 1).plan(3) == Plan([4, 6], 7)
    book.note_plan(3, Plan([4, 5], 6), must_be_same=False)
    assert book.plan(3) == Plan([4, 5], 6)
    book.note_plan(3, Plan([4, 5], 6), must_be_same=True)
    assert ledger(tmp_path, fingerprint="other").plan(3) is None, "it is of another configuration"


def test_a_plan_on_which_updates_were_made_must_stay(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.note_plan(3, Plan(list(range(20)), 40), must_be_same=True)
    with pytest.raises(
        ValueError, match=r"trains on prompts 0, 1, .* … \(20 of them\); its recorded rollouts come to 4"
    ):
        book.note_plan(3, Plan([4], 5), must_be_same=True)
    assert book.plan(3) == Plan(list(range(20)), 40)


@pytest.mark.parametrize(
    "damage", [lambda text: text.replace("4", "5"), lambda text: "00000000 {}\n", lambda text: "{"]
)
def test_a_damaged_plan_is_told(damage: Callable[[str], str], tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.note_plan(3, Plan([4, 6], 7), must_be_same=False)
    path = tmp_path / "step_000003" / "plan.json"
    path.write_text(damage(path.read_text()))
    if path.read_text().endswith("\n"):
        with pytest.raises(ValueError, match=r"plan\.json, line 1 is not what was written there"):
            book.plan(3)
    else:
        assert book.plan(3) is None, "a torn line is no line"


# --- what the next step goes on with ----------------------------------------------------------------------------------


def carried(prompt_id: int, index: int, begun_at_step: int = 2, is_judged: bool = False) -> Carried:
    return Carried(sample(prompt_id, index), begun_at_step, is_judged)


def test_what_is_carried_comes_back_bit_for_bit(tmp_path: Path) -> None:
    first, second = [carried(0, 2), carried(3, 1, 1, is_judged=True)], [carried(1, 0)]
    ledger(tmp_path).write_carried(4, 0, first)
    ledger(tmp_path, 5).write_carried(4, 1, second)
    write(tmp_path, 0, 4, [0])
    found = ledger(tmp_path).carried(4, 0, 2)
    assert [(one.begun_at_step, one.is_judged) for one in found] == [(2, False), (1, True)]
    for one, written in zip(found, first, strict=True):
        assert one.response.prompt_ids.tolist() == [], "no record has it"
        one.response.prompt_ids, one.response.response_text = (
            written.response.prompt_ids,
            written.response.response_text,
        )
        assert same(one.response, written.response)
    places = [(one.response.prompt_id, one.response.sample_index) for one in ledger(tmp_path).carried(4, 0, 1)]
    assert places == [(0, 2), (1, 0), (3, 1)], "one rank takes over what two had"
    assert len(ledger(tmp_path).carried(4, 1, 3)) == 1
    assert ledger(tmp_path).carried(4, 2, 3) == []
    assert ledger(tmp_path).carried(5, 0, 2) == []
    assert list(ledger(tmp_path).finished(4, 0, PROMPTS)) == [("sums", 0, 0), ("sums", 0, 1)], "it is none of these"


@pytest.mark.parametrize("missing", ["begun_at_step", "is_judged", "response_ids"])
def test_a_carried_response_that_is_none_is_named(tmp_path: Path, missing: str) -> None:
    ledger(tmp_path).write_carried(4, 0, [carried(0, 2)])
    path = tmp_path / "step_000004" / "carried_000.jsonl"
    header, record = read_lines(path)
    del record[missing]
    path.write_bytes(line_of(header) + line_of(record))
    with pytest.raises(ValueError, match=r"carried_000\.jsonl, line 2 is not what was written there"):
        ledger(tmp_path).carried(4, 0, 1)


def test_a_step_that_is_generated_anew_forgets_what_followed_from_it(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for step in (2, 3, 4, 5):
        write(tmp_path, 0, step, [0])
        book.note_plan(step, Plan([4], 5, num_carried=1), must_be_same=False)
        book.write_carried(step, 0, [carried(0, 2)])
    assert book.plan(3) == Plan([4], 5, 1)
    ledger(tmp_path).forget_after(3)
    assert book.plan(2) is not None
    assert book.plan(3) is None
    assert len(ledger(tmp_path).carried(3, 0, 1)) == 1, "the step itself goes on with it"
    assert len(ledger(tmp_path).finished(3, 0, PROMPTS)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002", "step_000003"]


def test_what_belongs_to_another_configuration_is_not_carried(tmp_path: Path) -> None:
    ledger(tmp_path).write_carried(4, 0, [carried(0, 2)])
    other = ledger(tmp_path, fingerprint="other")
    assert other.discard_others() == 1
    assert other.carried(4, 0, 1) == []
