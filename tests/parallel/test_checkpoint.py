"""A run that is saved in one layout and goes on in another is the run that was never stopped.

In the same layout bit for bit; in another within the rounding of float32 sums taken in another order.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import __version__ as core_version
from megatron.core import dist_checkpointing
from packaging.version import Version
from torch import Tensor

from megatron_fipo.actor import optimizer_state
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.optimizer import single_optimizers
from megatron_fipo.checkpoint.folder import latest_first, latest_name
from megatron_fipo.checkpoint.torch_dist import (
    CheckpointError,
    Keeping,
    begin_checkpoint,
    find_whole_checkpoint,
    load_checkpoint,
    load_loop_state,
)
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from tests.parallel import layouts
from tests.parallel.layouts import Case, Outcome, config_of, layout, train_step, whole_weights
from tests.parallel.ranks import RankError, run_ranks

P = ParallelSection
LOOP_STATE = {"next_step": 1, "prompts": {"cursor": 7}, "sampler": [torch.tensor([1, 2]), None, "text"]}

ONE_MICROBATCH = 400
"""So many tokens take what a rank has of an update: how it is cut into microbatches is nothing that is saved."""

SAVED = {
    distributed: Case("saved", parallel=P(tp=2), distributed=distributed, max_tokens=ONE_MICROBATCH)
    for distributed in (True, False)
}
"""What is saved, by whether the optimizer is sharded: two tensor-parallel ranks, after one step of two updates."""

GOING_ON: dict[int, list[ParallelSection]] = {
    1: [P()],
    2: [P(tp=2), P(tp=2, sequence_parallel=True), P(cp=2), P(pp=2), P()],
    4: [P(pp=2, virtual_pp=2), P(tp=2, pp=2), P(cp=2), P(tp=2)],
}
"""World size -> layouts that the run goes on in; what the layout leaves is data parallel."""


@dataclass
class Continued:
    """A run after the checkpoint: one more step."""

    start: dict[str, Tensor]
    outcome: Outcome
    loop_state: dict[str, Any]


def _save(case: Case, model: str, folder: str) -> Continued | None:
    """Train a step, save, go on for another: the run that is never stopped."""
    config = config_of(case, model)
    with layout(case.parallel) as ranks:
        actor = Actor(config, ranks)
        train_step(actor, config, 0, Outcome())
        start = whole_weights(actor)
        saved = begin_checkpoint(actor, folder, 1, LOOP_STATE, Keeping(last=2), asynchronous=False).finish()
        assert saved == Path(folder) / "step_000001"
        outcome = Outcome()
        train_step(actor, config, 1, outcome)
        outcome.weights = whole_weights(actor)
    return Continued(start, outcome, {}) if dist.get_rank() == 0 else None


def _go_on(cases: list[Case], model: str, folder: str) -> list[Continued] | None:
    """Build the actor anew in each layout, load, and train the second step."""
    found = []
    for case in cases:
        config = config_of(case, model)
        with layout(case.parallel) as ranks:
            actor = Actor(config, ranks)
            loop_state = load_checkpoint(actor, latest_first(Path(folder))[0])
            start, outcome = whole_weights(actor), Outcome()
            train_step(actor, config, 1, outcome)
            outcome.weights = whole_weights(actor)
            found.append(Continued(start, outcome, loop_state))
    return found if dist.get_rank() == 0 else None


class Checkpoints:
    """Saved runs, and how they went on; each launch once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = layouts.save_models(folder)
        self.shallow = layouts.save_models(folder / "shallow", num_layers=2)["qwen2"]
        """For what lies in a folder, however many layers that is."""
        self.saved = cache(self._saved)
        self.went_on = cache(self._went_on)

    def path(self, distributed: bool) -> str:
        return str(self.folder / f"checkpoints_{distributed}")

    def _saved(self, distributed: bool) -> Continued:
        return run_ranks(_save, 2, SAVED[distributed], self.models["qwen2"], self.path(distributed), timeout_s=120)[0]

    def _went_on(self, world_size: int, distributed: bool) -> list[Continued]:
        self.saved(distributed)
        cases = [replace(SAVED[distributed], parallel=parallel) for parallel in GOING_ON[world_size]]
        arguments = (cases, self.models["qwen2"], self.path(distributed))
        return run_ranks(_go_on, world_size, *arguments, timeout_s=240)[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def moved_apart(one: Continued, other: Continued) -> float:
    """||difference of the weights|| / ||what the step moved them by||."""
    difference = sum(
        float((one.outcome.weights[name] - weight).double().square().sum())
        for name, weight in other.outcome.weights.items()
    )
    moved = sum(
        float((other.start[name] - weight).double().square().sum()) for name, weight in other.outcome.weights.items()
    )
    return math.sqrt(difference / moved)


def _name(parallel: ParallelSection, world_size: int) -> str:
    sizes = {"tp": parallel.tp, "pp": parallel.pp, "vpp": parallel.virtual_pp or 1, "cp": parallel.cp}
    sizes["dp"] = world_size // (parallel.tp * parallel.pp * parallel.cp)
    found = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "alone"
    return found + (" sp" if parallel.sequence_parallel else "")


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded optimizer", "whole optimizer"])
@pytest.mark.parametrize(
    ("world_size", "index"),
    [
        pytest.param(world, index, id=_name(parallel, world))
        for world, sections in GOING_ON.items()
        for index, parallel in enumerate(sections)
    ],
)
def test_a_run_goes_on_in_any_layout(checkpoints: Checkpoints, world_size: int, index: int, distributed: bool) -> None:
    unstopped = checkpoints.saved(distributed)
    went_on = checkpoints.went_on(world_size, distributed)[index]
    assert went_on.start.keys() == unstopped.start.keys()
    for name, weight in unstopped.start.items():
        assert torch.equal(went_on.start[name], weight), f"{name} differs right after loading"
    assert str(went_on.loop_state) == str(LOOP_STATE)
    if GOING_ON[world_size][index] == SAVED[distributed].parallel and world_size == 2:
        assert went_on.outcome.grad_norms == unstopped.outcome.grad_norms
        assert moved_apart(went_on, unstopped) == 0
    else:
        for ours, theirs in zip(went_on.outcome.grad_norms, unstopped.outcome.grad_norms, strict=True):
            assert abs(ours - theirs) / theirs <= layouts.GRADIENT_BOUND
        assert moved_apart(went_on, unstopped) <= layouts.WEIGHT_BOUND


DEEP = Case("deep", parallel=P(tp=2, pp=2), max_tokens=ONE_MICROBATCH)


def test_from_tensor_and_pipeline_to_context_and_data_parallelism(checkpoints: Checkpoints, tmp_path: Path) -> None:
    model = checkpoints.models["qwen2"]
    unstopped = run_ranks(_save, 4, DEEP, model, str(tmp_path), timeout_s=120)[0]
    case = replace(DEEP, parallel=P(cp=2))  # on four ranks: twice context, twice data parallel
    (went_on,) = run_ranks(_go_on, 4, [case], model, str(tmp_path), timeout_s=120)[0]
    assert all(torch.equal(went_on.start[name], weight) for name, weight in unstopped.start.items())
    for ours, theirs in zip(went_on.outcome.grad_norms, unstopped.outcome.grad_norms, strict=True):
        assert abs(ours - theirs) / theirs <= layouts.GRADIENT_BOUND
    assert 0 < moved_apart(went_on, unstopped) <= layouts.WEIGHT_BOUND


def _save_before_any_update(case: Case, model: str, folder: str) -> None:
    """A run that is stopped during its first rollouts saves what it started with, and goes on as if it had not."""
    config, kept, outcomes = config_of(case, model), [], []
    with layout(case.parallel) as ranks:
        for is_resumed in (False, True):
            actor = Actor(config, ranks)
            if is_resumed:
                assert load_checkpoint(actor, Path(folder) / "step_000000") == {"next_step": 0}
            else:
                begin_checkpoint(actor, folder, 0, {"next_step": 0}, Keeping(last=1), asynchronous=False).finish()
            kept.append(whole_weights(actor))
            outcomes.append(Outcome())
            train_step(actor, config, 0, outcomes[-1])
            outcomes[-1].weights = whole_weights(actor)
        unsaved = Outcome()
        train_step(Actor(config, ranks), config, 0, unsaved)
    assert all(torch.equal(kept[0][name], weight) for name, weight in kept[1].items())
    assert outcomes[0].grad_norms == outcomes[1].grad_norms == unsaved.grad_norms
    assert all(torch.equal(outcomes[0].weights[name], weight) for name, weight in outcomes[1].weights.items())


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded optimizer", "whole optimizer"])
def test_a_run_can_be_saved_before_its_first_update(
    checkpoints: Checkpoints, tmp_path: Path, distributed: bool
) -> None:
    run_ranks(_save_before_any_update, 2, SAVED[distributed], checkpoints.shallow, str(tmp_path), timeout_s=120)


# --- mistakes on purpose ---------------------------------------------------------------------------------------------


def _fresh_moments(actor: Any) -> None:
    for optimizer in single_optimizers(actor.optimizer):
        for state in optimizer.optimizer.state.values():
            state["exp_avg"].zero_()


def _go_on_wrongly(mistake: str, case: Case, model: str, folder: str) -> Continued | None:
    patches: dict[str, Callable[[], Any]] = {
        "shared Adam steps": lambda: mock.patch.object(optimizer_state, "separate_adam_steps"),
        "moments forgotten": lambda: mock.patch.object(
            optimizer_state, "separate_adam_steps", lambda optimizer: _fresh_moments(mock.Mock(optimizer=optimizer))
        ),
        "nothing": nullcontext,
    }
    with patches[mistake]():
        found = _go_on([case], model, folder)
    return found[0] if found else None


@pytest.mark.parametrize("mistake", ["nothing", "shared Adam steps", "moments forgotten"])
def test_a_mistake_in_the_optimizer_state_is_noticed(checkpoints: Checkpoints, mistake: str) -> None:
    unstopped = checkpoints.saved(True)
    arguments = (mistake, SAVED[True], checkpoints.models["qwen2"], checkpoints.path(True))
    apart = moved_apart(run_ranks(_go_on_wrongly, 2, *arguments, timeout_s=120)[0], unstopped)
    assert apart == 0 if mistake == "nothing" else apart > 100 * layouts.WEIGHT_BOUND


# --- what lies in the folder -----------------------------------------------------------------------------------------


RENAMED = [(2, "step_000002"), (2, "step_000002.again"), (2, "step_000002")]


def _save_several(case: Case, model: str, folder: str) -> list[list[str]]:
    """Save at steps 1, 2, 2 and 2 again, 3 with keep_last=2; the folder's entries after each."""
    seen = []
    with layout(case.parallel) as ranks:
        actor = Actor(config_of(case, model), ranks)
        for step, name in ((1, "step_000001"), *RENAMED, (3, "step_000003")):
            begin_checkpoint(actor, folder, step, {"next_step": step}, Keeping(last=2), asynchronous=False).finish()
            seen.append(sorted(path.name for path in Path(folder).iterdir()))
            assert latest_name(Path(folder)) == name
        assert load_checkpoint(actor, Path(folder) / "step_000002") == {"next_step": 2}
    return seen


def test_the_newest_are_kept_and_the_others_deleted(checkpoints: Checkpoints, tmp_path: Path) -> None:
    # As the leader sees it: when it lists the folder, the next save has not begun.
    arguments = (SAVED[True], checkpoints.shallow, str(tmp_path))
    seen = run_ranks(_save_several, 2, *arguments, timeout_s=120)[0]
    assert seen[0] == ["latest", "step_000001"]
    assert seen[1] == ["latest", "step_000001", "step_000002"]
    assert seen[2] == ["latest", "step_000001", "step_000002.again"]
    assert seen[3] == ["latest", "step_000001", "step_000002"]
    assert seen[4] == ["latest", "step_000002", "step_000003"]


def _die_while_saving(when: str, step: int, case: Case, model: str, folder: str) -> None:
    """Save step 1, then be killed in the middle of saving step 2, or step 1 anew."""
    real_save = dist_checkpointing.save

    def half_a_save(state: Any, path: str, *rest: Any, **keywords: Any) -> None:
        real_save(state, path, *rest, **keywords)
        os.remove(next(file for file in Path(path).iterdir() if file.suffix == ".distcp"))
        os._exit(9)

    def dying_at(name: str, rename: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
        def renaming(path: Path, target: Path) -> Any:
            if Path(target).name == name:
                os._exit(9)
            return rename(path, target)

        return renaming

    with layout(case.parallel) as ranks:
        actor = Actor(config_of(case, model), ranks)
        begin_checkpoint(actor, folder, 1, LOOP_STATE, Keeping(last=1), asynchronous=False).finish()
        patches = {
            "writing": mock.patch.object(dist_checkpointing, "save", half_a_save),
            "before it is whole": mock.patch.object(
                Path, "rename", dying_at("step_000002" if step == 2 else "step_000001.again", Path.rename)
            ),
            "before latest moves": mock.patch.object(os, "replace", dying_at("latest", os.replace)),
        }
        with patches[when]:
            begin_checkpoint(actor, folder, step, {"next_step": step}, Keeping(last=1), asynchronous=False).finish()


@pytest.mark.parametrize("step", [2, 1], ids=["the next step", "the same step"])
@pytest.mark.parametrize("when", ["writing", "before it is whole", "before latest moves"])
def test_a_killed_save_leaves_the_one_before(checkpoints: Checkpoints, tmp_path: Path, when: str, step: int) -> None:
    case, model = replace(SAVED[True], parallel=P()), checkpoints.shallow
    with pytest.raises(RankError, match="died without a word"):
        run_ranks(_die_while_saving, 1, when, step, case, model, str(tmp_path), timeout_s=120)
    assert latest_name(tmp_path) == "step_000001"
    went_on = run_ranks(_go_on, 1, [case], model, str(tmp_path), timeout_s=120)[0]
    assert str(went_on[0].loop_state) == str(LOOP_STATE)


def _save_in_background(case: Case, model: str, folder: str) -> None:
    """The snapshot is that of its moment, however far training is when it is written."""
    config = config_of(case, model)
    with layout(case.parallel) as ranks:
        actor = Actor(config, ranks)
        train_step(actor, config, 0, Outcome())
        kept = whole_weights(actor)
        pending = begin_checkpoint(actor, folder, 1, LOOP_STATE, Keeping(last=1))
        unstopped = Outcome()
        train_step(actor, config, 1, unstopped)
        moved = whole_weights(actor)
        assert latest_name(Path(folder)) is None, "it takes its place when every rank has asked for it"
        while not pending.poll():
            pass
        assert latest_name(Path(folder)) == pending.target.name == "step_000001"
        assert pending.target.parent == Path(folder)
        again, outcome = Actor(config, ranks), Outcome()
        assert str(load_checkpoint(again, pending.target)) == str(LOOP_STATE)
        assert all(torch.equal(kept[name], weight) for name, weight in whole_weights(again).items())
        assert not all(torch.equal(moved[name], kept[name]) for name in kept)
        train_step(again, config, 1, outcome)
        assert outcome.grad_norms == unstopped.grad_norms


@pytest.mark.parametrize("parallel", [P(tp=2), P(cp=2)], ids=["tp2", "cp2"])
def test_a_checkpoint_is_written_while_training_goes_on(
    checkpoints: Checkpoints, tmp_path: Path, parallel: ParallelSection
) -> None:
    case = replace(SAVED[True], parallel=parallel)
    run_ranks(_save_in_background, 2, case, checkpoints.shallow, str(tmp_path), timeout_s=120)


def _damage(folder: str, step: int) -> None:
    if step == 2:  # a flipped bit that leaves it JSON
        manifest = Path(folder, f"step_{step:06d}", "manifest.json")
        manifest.write_text(manifest.read_text().replace('"bytes"', '"bytec"', 1))
        return
    (file, *_) = sorted(Path(folder, f"step_{step:06d}").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _find_none(folder: Path, ranks: ParallelGroups) -> None:
    """No checkpoint is no error, and a `latest` that names one that is not there is."""
    said: list[str] = []
    assert find_whole_checkpoint(folder, ranks, said.append) is None
    exchange.barrier(ranks.world)
    if ranks.rank == 0:
        folder.mkdir()
        (folder / "latest").write_text("step_000007\n")
    exchange.barrier(ranks.world)
    with pytest.raises(ValueError, match="is whole, and its file latest names step_000007") as caught:
        find_whole_checkpoint(folder, ranks, said.append)
    assert "set train.resume=false to start over" in str(caught.value)
    assert said == []


def _find_whole(case: Case, model: str, folder: str) -> None:
    with layout(case.parallel) as ranks:
        _find_none(Path(folder) / "none", ranks)
        actor = Actor(config_of(case, model), ranks)
        for step in (1, 2, 3):
            begin_checkpoint(actor, folder, step, {"next_step": step}, Keeping(last=3), asynchronous=False).finish()
        said: list[str] = []
        assert find_whole_checkpoint(folder, ranks, said.append) == Path(folder) / "step_000003"
        assert said == []
        for step in (3, 2, 1):
            exchange.barrier(ranks.world)
            if ranks.rank == 0:
                _damage(folder, step)
            exchange.barrier(ranks.world)
            said.clear()
            if step > 1:
                found = find_whole_checkpoint(folder, ranks, said.append)
                assert found == Path(folder) / f"step_{step - 1:06d}"
                assert load_loop_state(found) == {"next_step": step - 1}
                assert len(said) == 4 - step
                assert "step_000003 is damaged and is passed over: __0_0.distcp has changed since it was" in said[0]
                assert step == 3 or "manifest.json has changed since it was written (an entry is not" in said[1]
            else:
                with pytest.raises(ValueError, match=r"no checkpoint in .* is whole, and its file latest names step"):
                    find_whole_checkpoint(folder, ranks, said.append)


def test_a_damaged_checkpoint_is_passed_over_loudly(checkpoints: Checkpoints, tmp_path: Path) -> None:
    run_ranks(_find_whole, 2, SAVED[True], checkpoints.shallow, str(tmp_path), timeout_s=120)


def _run_out_of_room(asynchronous: bool, case: Case, model: str, folder: str) -> str:
    """The operating system refuses to let a file grow; what comes of it on this rank."""
    with layout(case.parallel) as ranks:
        actor = Actor(config_of(case, model), ranks)
        begin_checkpoint(actor, folder, 1, LOOP_STATE, Keeping(last=1), asynchronous=False).finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            begin_checkpoint(actor, folder, 2, {"next_step": 2}, Keeping(last=1), asynchronous=asynchronous).finish()
        except CheckpointError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_an_error_on_every_rank_and_loses_nothing(
    checkpoints: Checkpoints, tmp_path: Path, asynchronous: bool
) -> None:
    arguments = (asynchronous, SAVED[True], checkpoints.shallow, str(tmp_path))
    messages = run_ranks(_run_out_of_room, 2, *arguments, timeout_s=120)
    assert all("checkpoint" in message and "could not be written" in message for message in messages)
    # Megatron-Core 0.19 tells the system's words to its log and raises only the error's type.
    words = "File too large" if Version(core_version) < Version("0.19") else "<class 'OSError'>"
    assert words in messages[0]
    assert "GiB are free there" in messages[0]
    assert latest_name(tmp_path) == "step_000001"
    case = SAVED[True]
    (went_on,) = run_ranks(_go_on, 2, [case], checkpoints.shallow, str(tmp_path), timeout_s=120)[0]
    assert str(went_on.loop_state) == str(LOOP_STATE)
