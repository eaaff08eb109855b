"""Runs that stream from running servers: what their ranks watch, what servers say of their load, what was recorded."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fipo.config import ServersSection
from megatron_fipo.rollout.engine import GenerationRequest, Turn
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.plugins.server_guard import bearer
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.setup import ADAPTERS
from megatron_fipo.rollout.stream import Stream
from tests.end_to_end.runs import BASE, ROOT, Preparation, train
from tests.engines.attaching import KEY_ENV
from tests.engines.serving import KEY, launch_spec

PATIENCE_S = 600.0
NUM_PROMPTS, NUM_SAMPLES = 4, 8
MOST_REQUESTS = {"sglang": 256, "vllm": 8}
"""At each server: all that a step begins, or so few that others are in flight when those of the batch are done."""


@contextmanager
def running_servers(engine: str, folder: Path, number: int) -> Iterator[list[str]]:
    """Servers of the quick-start's model that nobody has attached to yet; their addresses."""
    loop = EventLoopThread()
    specs = [launch_spec(engine, ROOT / BASE, index=index) for index in range(number)]
    # A health probe would count among what a server works on.
    settings = ServersSection(start_timeout_s=300.0, health_interval_s=PATIENCE_S)
    pool = ServerPool(ADAPTERS[engine](), specs, settings, log_folder=folder)
    loop.run(pool.start())
    try:
        yield [server.client.url for server in pool.servers]
    finally:
        loop.run(pool.close())
        loop.stop()


def num_requests(engine: str, url: str) -> int:
    """How many requests a server works on or has waiting, as it says itself."""
    route = {"sglang": "/v1/loads?include=core", "vllm": "/metrics"}[engine]
    asked = urllib.request.Request(url + route, headers={"Authorization": bearer(KEY)})
    with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
        text = answer.read().decode()
    if engine == "sglang":
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in json.loads(text)["loads"])
    counts = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    ]
    assert len(counts) == 2, text
    return int(sum(counts))


def stream(
    folder: Path, engine: str, urls: Sequence[str], launch: str, *, prepare: Preparation, expected: int | None = None
) -> None:
    """Train three steps on running servers, of which each rank attaches to some if there is more than one.

    Args:
        launch: a name for what is seen in it.
    """
    train(
        folder,
        "train.num_steps=3",
        "train.resume=true",
        f"rollout.engine={engine}",
        f"servers.urls=[{','.join(urls)}]",
        f"servers.api_key_env={KEY_ENV}",
        f"servers.health_interval_s={PATIENCE_S}",
        "sampling.streaming=true",
        "sampling.max_surplus_age_steps=0",
        f"rollout.num_prompts={NUM_PROMPTS}",
        f"rollout.num_samples_per_prompt={NUM_SAMPLES}",
        "data.train.chains.params.num_terms=7",  # from two terms on: responses from 6 tokens to 96
        "optimizer.num_warmup_steps=1",
        "optimizer.learning_rate=3e-4",
        f"servers.max_concurrent_requests={MOST_REQUESTS[engine]}",
        "sampling.max_generation_rounds=50",  # few groups have a signal where updates are that large
        prepare=partial(_prepare, engine, len(urls) > 1, folder.with_suffix(".seen"), launch, prepare),
        expected=expected,
        timeout_s=PATIENCE_S,
    )


# --- on ranks --------------------------------------------------------------------------------------------------------


def nothing() -> None:
    """The run goes on to its end."""


def on_rank(rank: int, action: Callable[[], None]) -> None:
    """Do something on one rank alone."""
    if int(os.environ["RANK"]) == rank:
        action()


def _prepare(engine: str, is_node: bool, seen: Path, launch: str, then: Preparation) -> None:
    os.environ[KEY_ENV] = KEY
    if is_node:
        os.environ["LOCAL_RANK"] = "0"  # a node of its own, which owns servers
    RolloutLedger.forget_before = lambda self, step: None  # type: ignore[method-assign]
    note = partial(_note, seen, launch=launch)
    _watch_ends(engine, note)
    _watch_updates(engine, note)
    then()


def _note(seen: Path, **what: Any) -> None:
    with seen.open("a") as file:
        file.write(json.dumps({"rank": int(os.environ["RANK"]), **what}) + "\n")


def _load(engine: str, servers: ServerEngine) -> int:
    assert servers.owned is not None
    return sum(num_requests(engine, server.client.url) for server in servers.owned.pool.servers)


def _watch_ends(engine: str, note: Callable[..., None]) -> None:
    """Note how many responses a stream's end has cut short, and how many servers still have then."""
    abort, aborted = Stream._abort, [0]

    async def watched(self: Stream) -> None:
        await abort(self)
        load = _load(engine, self._engine)  # type: ignore[arg-type]
        note(at="end", step=self._step, aborted=aborted[0], load=load)
        aborted[0] = 0

    Stream._abort = watched  # type: ignore[method-assign]
    generate = ServerEngine.generate

    async def counted(self: ServerEngine, request: GenerationRequest) -> Turn:
        turn = await generate(self, request)
        aborted[0] += turn.finish_reason == "abort"
        return turn

    ServerEngine.generate = counted  # type: ignore[method-assign]


def _watch_updates(engine: str, note: Callable[..., None]) -> None:
    """Note what servers work on before they are given weights."""
    update = ServerEngine.update_weights

    def watched(self: ServerEngine, tensors: Any, policy_version: int) -> None:
        if self.owned is not None:
            note(at="update", version=policy_version, load=_load(engine, self))
        update(self, tensors, policy_version)

    ServerEngine.update_weights = watched  # type: ignore[method-assign]


def seen_by(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of all launches of a run have noted, in order."""
    return [json.loads(line) for line in folder.with_suffix(".seen").read_text().splitlines()]


# --- what is left of a run -------------------------------------------------------------------------------------------


def records(folder: Path, step: int) -> list[dict[str, Any]]:
    """Every response in a step's ledger, with the rank that generated it, in order of rank and time."""
    found = []
    for file in sorted((folder / "rollouts" / f"step_{step:06d}").glob("rank_*.jsonl")):
        lines = [json.loads(line.partition(" ")[2]) for line in file.read_text().splitlines()]
        found += [line | {"rank": int(file.stem[-3:])} for line in lines if "prompt_id" in line]
    return found


def plan(folder: Path, step: int) -> tuple[list[int], int] | None:
    """Prompts that a step trains on, and the next step's first one, as the ledger has them."""
    path = folder / "rollouts" / f"step_{step:06d}" / "plan.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text().partition(" ")[2])
    return found["prompt_ids"], found["next_prompt"]


def first_with_a_signal(recorded: Sequence[dict[str, Any]], first_prompt: int) -> tuple[list[int], int]:
    """What a step must train on: the first groups of right and wrong responses, in the order of prompts."""
    by_prompt: dict[int, list[float]] = {}
    for one in recorded:
        by_prompt.setdefault(one["prompt_id"], []).append(one["accuracy"])
    chosen: list[int] = []
    prompt = first_prompt
    while len(chosen) < NUM_PROMPTS:
        scores = by_prompt[prompt]
        assert len(scores) == NUM_SAMPLES, f"prompt {prompt} is used with {len(scores)} responses"
        if len({score == 1.0 for score in scores}) == 2:
            chosen.append(prompt)
        prompt += 1
    return chosen, prompt
