"""A run on real servers that carries responses over and is killed again and again, at moments drawn at random.

Servers stay up. Whatever the moments are, every prompt is used once and in order, with all of its responses.
MEGATRON_FIPO_RANDOM_KILLS says how many kills there are; pytest's -s shows where each of them fell.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.actor.actor import Actor
from megatron_fipo.parallel.local_ranks import RankError
from megatron_fipo.rollout.carry_over import CarryOver
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.sglang.client import SglangServer
from megatron_fipo.rollout.stream import Stream
from megatron_fipo.run.place import Place
from tests.end_to_end import kills
from tests.end_to_end.runs import step_lines
from tests.engines import streamed
from tests.engines.accounts import BOUND, NUM_SAMPLES, account_for

NUM_KILLS = int(os.environ.get("MEGATRON_FIPO_RANDOM_KILLS", "2"))
STEPS_AHEAD = 4
"""A launch is killed in one of so many steps."""
OVERRIDES = (
    f"rollout.max_staleness_steps={BOUND}",
    "servers.max_concurrent_requests=16",
    "checkpoint.every_num_steps=2",
    "optimizer.learning_rate=1e-4",
)
OVERLAP = ("rollout.overlap=true", "evaluation.every_num_steps=0")
HANDOVER = ("pause", "begin_update", "load_bucket", "end_update", "checksums", "score", "resume")
"""What a handover asks of each server."""

Moment = tuple[str, Callable[[], None]]


def _drawn(number: int, draw: random.Random) -> Moment:
    """A moment within the first steps of a launch, and how a rank comes to die then; each kind of them in turn."""
    call = draw.choice(HANDOVER)
    calls: list[tuple[str, Any, str, int]] = [
        ("response", RolloutLedger, "append", draw.randint(1, 24)),
        (call, SglangServer, call, draw.randint(1, 2)),
        ("update", Actor, "update", draw.randint(1, 4)),
        ("record of what is carried", RolloutLedger, "write_carried", draw.randint(1, 2)),
    ]
    kind = number % (len(calls) + 1)
    if kind == len(calls):
        seconds = draw.uniform(0.0, 4.0)
        return f"{seconds:.2f} s after its first handover began", partial(_after_the_first_handover, seconds)
    what, owner, name, count = calls[kind]
    return f"{what} {count}", partial(_at_call, owner, name, count)


@pytest.mark.sglang
@pytest.mark.parametrize(
    "more", [pytest.param((), marks=pytest.mark.long, id="carry-over"), pytest.param(OVERLAP, id="overlap")]
)
def test_every_prompt_is_accounted_for_whenever_the_run_is_killed(more: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with streamed.running_servers("sglang", tmp_path / "logs") as urls:
        for number in range(NUM_KILLS):
            draw = random.Random(f"kill {number}")
            moment, kill = _drawn(number, draw)
            victim = draw.randrange(len(urls))
            prepare = partial(_watched, folder.with_suffix(".kills"), number, partial(streamed.on_rank, victim, kill))
            last = f"train.num_steps={_num_done(folder) + STEPS_AHEAD}"
            with pytest.raises(RankError):
                streamed.stream(folder, "sglang", urls, f"kill {number}", *OVERRIDES, *more, last, prepare=prepare)
            print(f"\n| {number} | rank {victim}, {moment} | {_num_done(folder)} steps done |")
        num_steps = _num_done(folder) + 1
        last = f"train.num_steps={num_steps}"
        streamed.stream(
            folder, "sglang", urls, "finished", *OVERRIDES, *more, last, prepare=streamed.nothing, expected=0
        )
    fell = folder.with_suffix(".kills").read_text().splitlines()
    account = account_for(folder, num_steps)
    print(*fell, account, sep="\n")
    assert len(fell) == NUM_KILLS
    lines = step_lines(folder)
    assert [line["step"] for line in lines] == list(range(num_steps))
    for line in lines:
        difference = line["mismatch/newest_version/log_prob_difference/absmax"]
        assert difference is None or difference < 1e-4
        assert line["rollout/staleness_steps/max"] <= BOUND
    assert account.lost == {}
    assert account.num_used == sum(line["rollout/generated_groups"] for line in lines) * NUM_SAMPLES


def _num_done(folder: Path) -> int:
    return len(step_lines(folder)) if (folder / "metrics.jsonl").exists() else 0


# --- on ranks --------------------------------------------------------------------------------------------------------


def _at_call(owner: Any, name: str, number: int) -> None:
    """Die before the so-many-th call of a function."""
    kills.die_at(owner, name, lambda count, *args, **keywords: count == number)


def _after_the_first_handover(seconds: float) -> None:
    """Die so long after a launch's first handover has begun, wherever it is then."""
    give, timers = ServerEngine.give, []

    def timed(self: ServerEngine, *args: Any) -> None:
        if not timers:
            timers.append(threading.Timer(seconds, kills.die))
            timers[0].daemon = True
            timers[0].start()
        give(self, *args)

    ServerEngine.give = timed  # type: ignore[method-assign]


def _watched(file: Path, number: int, then: Callable[[], None]) -> None:
    """Note where a rank is when it dies."""
    then()
    inside: list[str] = []
    for owner, name, where in (
        (ServerEngine, "give", "handover"),
        (CarryOver, "keep", "taking over"),
        (Actor, "log_probs", "log-probs"),
        (Actor, "update", "update"),
        (Place, "save", "save"),
    ):
        _mark(owner, name, where, inside)
    run, die = Stream.run, kills.die

    async def marked(self: Stream) -> None:
        inside.append(f"stream of step {self._step}")
        await run(self)
        inside.pop()

    def noting() -> None:
        with file.open("a") as notes:
            notes.write(f"| {number} | {inside[-1] if inside else 'between'} |\n")
        die()

    Stream.run, kills.die = marked, noting  # type: ignore[method-assign]


def _mark(owner: Any, name: str, where: str, inside: list[str]) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def marked(*args: Any, **keywords: Any) -> Any:
        inside.append(where)
        result = original(*args, **keywords)
        inside.pop()
        return result

    setattr(owner, name, marked)
