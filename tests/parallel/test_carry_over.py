"""What ranks take over from step to step: each its own, from its memory or the ledger, and no longer than it may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from megatron_fipo.config import ParallelSection, RolloutSection
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.carry_over import CARRIED_TOKENS, DROPPED_TOKENS, CarryOver
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.ledger import RolloutLedger
from tests.parallel.layouts import layout
from tests.parallel.ranks import run_ranks

STEP, NEXT_PROMPT = 5, 10


def prompt(prompt_id: int) -> Prompt:
    return Prompt(prompt_id, "s", "", (7, prompt_id), "exact", "1")


def response(prompt_id: int, index: int, num_tokens: int, version: int = STEP, reason: str = "stop") -> Trajectory:
    tokens = torch.arange(num_tokens) + 100 * prompt_id + index
    segment = Segment(tokens, "policy", -tokens.float() / 7, version)
    return Trajectory(SampleKey("s", prompt_id, index), torch.tensor([7, prompt_id]), [segment], reason)


class Told:
    """Takes warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str, kind: str = "") -> None:
        self.texts.append(text)


def carry_over(ranks: ParallelGroups, folder: Path, bound: int = 1, too_stale: str = "drop") -> tuple[CarryOver, Told]:
    """On two nodes of two ranks, whose first ranks generate."""
    os.environ["LOCAL_RANK"] = str(ranks.rank % 2)
    plane = DataPlane(ranks, ranks.rank % 2 == 0)
    ledger = RolloutLedger(folder, ranks.rank, "one", decode=lambda ids: "")
    told = Told()
    rollout = RolloutSection(max_staleness_steps=bound, too_stale=too_stale)
    return CarryOver(rollout, plane, ledger, told, ranks.world), told  # type: ignore[arg-type]


def end_of_step(carry: CarryOver, ranks: ParallelGroups) -> None:
    """Leader n has judged sample n of prompts 9 to 11, and begun sample n of prompts 11 and 12 besides."""
    leader = ranks.rank // 2
    held, left = Held(), []
    if ranks.rank % 2 == 0:
        for prompt_id in (9, 10, 11):
            held.add(Group(prompt(prompt_id), [response(prompt_id, leader, 4)], STEP))
        left = [
            Carried(response(11, leader + 2, 2, reason="abort"), STEP, is_judged=False),
            Carried(response(12, leader, 3, reason="abort"), STEP, is_judged=False),
        ]
    carry.keep(STEP, held, left, NEXT_PROMPT)


def places(found: list[tuple[Prompt, Carried]]) -> list[tuple[int, int]]:
    return [(one.response.prompt_id, one.response.sample_index) for _, one in found]


def same(found: list[tuple[Prompt, Carried]], expected: list[tuple[Prompt, Carried]]) -> bool:
    return [(p, flat(one)) for p, one in found] == [(p, flat(one)) for p, one in expected]


def flat(one: Carried) -> tuple[object, ...]:
    sample = one.response
    return (
        *(sample.key, one.begun_at_step, one.is_judged, sample.finish_reason, sample.prompt_ids.tolist()),
        *(sample.response_ids.tolist(), sample.rollout_log_probs.tolist(), sample.policy_versions),
    )


def _takes_over(folder: str, num_expected: int) -> list[str]:
    """Returns the warnings of a run that goes on from a checkpoint."""
    with layout(ParallelSection()) as ranks:
        leader = ranks.rank // 2 if ranks.rank % 2 == 0 else None
        carry, _ = carry_over(ranks, Path(folder))
        carry.begin(STEP, 9)
        assert carry.everywhere == set()
        end_of_step(carry, ranks)
        assert carry.count() == (8 if ranks.rank == 0 else 0)
        assert carry.metrics()[CARRIED_TOKENS].value() == (13 if leader is not None else 0)

        carry.begin(STEP + 1, NEXT_PROMPT)
        judged, unfinished = carry.judged(prompt), carry.unfinished(prompt)
        if leader is not None:
            assert places(judged) == [(10, leader), (11, leader)]
            assert places(unfinished) == [(11, leader + 2), (12, leader)]
        else:
            assert judged + unfinished == []
        assert carry.judged_everywhere == {(10, 0), (10, 1), (11, 0), (11, 1)}
        assert carry.everywhere == carry.judged_everywhere | {(11, 2), (11, 3), (12, 0), (12, 1)}

        again, told = carry_over(ranks, Path(folder))  # a run that goes on from a checkpoint
        again.expect(num_expected)
        again.begin(STEP + 1, NEXT_PROMPT)
        assert same(again.judged(prompt), judged)
        assert same([(p, one) for p, one in again.unfinished(prompt)], with_no_prompt(unfinished))
        assert again.everywhere == carry.everywhere
        return told.texts


def with_no_prompt(found: list[tuple[Prompt, Carried]]) -> list[tuple[Prompt, Carried]]:
    """A response that goes on needs no prompt of its own: its request has it."""
    for _, one in found:
        one.response.prompt_ids = torch.empty(0, dtype=torch.int64)
    return found


def test_each_rank_goes_on_with_its_own_from_memory_or_the_ledger(tmp_path: Path) -> None:
    assert run_ranks(_takes_over, 4, str(tmp_path), 8) == [[], [], [], []]


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    text = "step 6: 2 responses that were to go on are not recorded any more; they are begun anew"
    assert run_ranks(_takes_over, 4, str(tmp_path), 10) == [[text], [], [], []]


def _takes_up(folder: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]], set[tuple[int, int]]]:
    """What a rank has, of a step in which a killed run has come to judge some: as one leader where there were two."""
    with layout(ParallelSection()) as ranks:
        carry, _ = carry_over(ranks, Path(folder))
        carry.begin(STEP, 9)
        end_of_step(carry, ranks)
        ledger = RolloutLedger(Path(folder), 0, "one", decode=lambda ids: "")
        if ranks.rank == 0:  # it had judged one of rank 2's that went on, and one that nobody has begun here
            ledger.begin(STEP + 1)
            for place in ((11, 3), (12, 1), (40, 0)):
                ledger.append(0, response(*place, 5, version=STEP + 1))
            ledger.close()
        exchange.barrier(ranks.world)
        again, _ = carry_over(ranks, Path(folder))
        again.begin(STEP + 1, NEXT_PROMPT, takes_up=True)
        assert again.everywhere == carry_places() | {(40, 0)}
        return places(again.judged(prompt)), places(again.unfinished(prompt)), again.judged_everywhere


def carry_places() -> set[tuple[int, int]]:
    return {(10, 0), (10, 1), (11, 0), (11, 1), (11, 2), (11, 3), (12, 0), (12, 1)}


def test_what_a_killed_run_has_judged_in_the_step_is_taken_up(tmp_path: Path) -> None:
    """Also where another rank would have gone on with it."""
    everywhere = {(10, 0), (10, 1), (11, 0), (11, 1), (11, 3), (12, 1), (40, 0)}
    assert run_ranks(_takes_up, 4, str(tmp_path)) == [
        ([(10, 0), (11, 0), (11, 3), (12, 1), (40, 0)], [(11, 2), (12, 0)], everywhere),
        ([], [], everywhere),
        ([(10, 1), (11, 1)], [], everywhere),
        ([], [], everywhere),
    ]


def _stays_no_longer_than_it_may(folder: str, bound: int, too_stale: str) -> None:
    with layout(ParallelSection()) as ranks:
        carry, _ = carry_over(ranks, Path(folder), bound, too_stale)
        carry.begin(STEP, 9)
        end_of_step(carry, ranks)
        carry.begin(STEP + 1, NEXT_PROMPT)
        left = [one for _, one in carry.unfinished(prompt)]
        held = Held()
        for of_prompt, one in carry.judged(prompt):
            held.add(Group(of_prompt, [one.response], STEP + 1))
        carry.keep(STEP + 1, held, left, NEXT_PROMPT + 1)  # prompt 10 is used up, and all else stays as it is
        carry.begin(STEP + 2, NEXT_PROMPT + 1)
        found = carry.judged(prompt) + carry.unfinished(prompt)
        dropped = carry.metrics()[DROPPED_TOKENS].value()
        if bound == 1 and too_stale == "drop":
            assert found == []
            assert carry.everywhere == set()
            assert dropped == (9 if ranks.rank % 2 == 0 else 0)
        else:
            assert len(found) == (3 if ranks.rank % 2 == 0 else 0)
            assert {one.begun_at_step for _, one in found} <= {STEP}, "it is as old as when it was begun"
            assert dropped == 0


@pytest.mark.parametrize(("bound", "too_stale"), [(1, "drop"), (2, "drop"), (1, "mask")])
def test_what_would_be_too_stale_is_dropped_if_it_is_to_be(tmp_path: Path, bound: int, too_stale: str) -> None:
    run_ranks(_stays_no_longer_than_it_may, 4, str(tmp_path), bound, too_stale)


def _shared_out(folder: str) -> None:
    with layout(ParallelSection(cp=2)) as ranks:  # two ranks, one of which generates
        os.environ["LOCAL_RANK"] = str(ranks.rank)
        plane = DataPlane(ranks, ranks.rank == 0)
        ledger = RolloutLedger(Path(folder), ranks.rank, "one", decode=lambda ids: "")
        carry = CarryOver(RolloutSection(max_staleness_steps=1), plane, ledger, Told(), ranks.world)  # type: ignore[arg-type]
        carry.expect(8)
        carry.begin(STEP + 1, NEXT_PROMPT)
        found = places(carry.judged(prompt) + carry.unfinished(prompt))
        assert len(found) == len({*found}) == (8 if ranks.rank == 0 else 0)


def test_fewer_ranks_take_over_all_that_more_have_begun(tmp_path: Path) -> None:
    run_ranks(_takes_over, 4, str(tmp_path), 8)
    run_ranks(_shared_out, 2, str(tmp_path))


def _damaged(folder: str) -> None:
    with layout(ParallelSection()) as ranks:
        carry, _ = carry_over(ranks, Path(folder))
        with pytest.raises(ValueError, match=r"carried_001.jsonl, line 3 is not what was written there"):
            carry.begin(STEP + 1, NEXT_PROMPT)


def test_a_damaged_record_stops_all_ranks(tmp_path: Path) -> None:
    run_ranks(_takes_over, 4, str(tmp_path), 8)
    path = tmp_path / f"step_{STEP + 1:06d}" / "carried_001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"sample_index": 1', b'"sample_index": 2'), *lines[3:]]))
    run_ranks(_damaged, 4, str(tmp_path))
