"""benchmarks/gpu_evidence.py: what its reports promise, how it goes on past a case that fails, and the tables."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import gpu_evidence, render_evidence
from benchmarks.evidence import models, part_ablate, part_tests, rendering, schema
from benchmarks.evidence.patching import patched
from benchmarks.evidence.receiver import receive
from benchmarks.evidence.report import DONE, FAILED, PARTS, SIZES, SKIPPED, Report, Settings, SkipCase
from benchmarks.evidence.workbench import workbench
from megatron_fipo.actor.actor import Actor
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm import transport
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import digest
from tests.parallel.ranks import run_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_evidence.py"
QUICK = ("future_kl", "fp8", "memory", "ablate")
"""Parts that take a second or two; .ci/run runs them all."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of the quick parts at tiny shapes, their processes forked from the one that ranks are forked from."""
    folder = tmp_path_factory.mktemp("evidence")
    command = [str(SCRIPT), ",".join(QUICK), "--device", "cpu", "--tiny", "--out", str(folder)]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(gpu_evidence, "_PRELOAD", ("tests.parallel.preload", *gpu_evidence._PRELOAD)),
        mock.patch.dict(os.environ),  # the script sets variables for all that it starts
    ):
        assert gpu_evidence.main() == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["future_kl,no_part"], "part no_part is not known; known are tests, future_kl,"),
        (["actor", "3b"], "size 3b is not known; known are 0.5b,"),
    ],
)
def test_the_script_refuses_what_it_does_not_know(tmp_path: Path, arguments: list[str], said: str) -> None:
    command = [sys.executable, str(SCRIPT), *arguments, "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 2
    assert said in run.stderr
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, dict[str, Any]]:
    return {part: Report.read(folder / f"{part}.json").content for part in QUICK}


# --- the promise ------------------------------------------------------------------------------------------------------


def test_reports_are_whole_and_every_part_is_known(tiny: Path) -> None:
    for part, content in contents(tiny).items():
        assert schema.lacks(content) == []
        assert content["part"] == part
        assert any(case["status"] == DONE for case in content["cases"])
    assert set(schema.KINDS) == set(PARTS)
    assert {kind for kinds in schema.KINDS.values() for kind in kinds} == set(schema.PROMISED)


@pytest.mark.parametrize("part", QUICK)
def test_whatever_is_missing_is_noticed(tiny: Path, part: str) -> None:
    whole = contents(tiny)[part]
    done = next(case["name"] for case in whole["cases"] if case["status"] == DONE)
    for key in schema._HEAD:
        broken = copy.deepcopy(whole)
        del broken[key]
        assert schema.lacks(broken) == [f"{key} is missing"]
    for section in ("hardware", "software"):
        for key in list(whole[section])[:1]:
            broken = copy.deepcopy(whole)
            del broken[section][key]
            assert schema.lacks(broken) == [f"{section}.{key} is missing"]
    kind = next(case["values"]["kind"] for case in whole["cases"] if case["name"] == done)
    for key in schema.PROMISED[kind]:
        broken = copy.deepcopy(whole)
        del next(case for case in broken["cases"] if case["name"] == done)["values"][key]
        assert schema.lacks(broken) == [f"{done}: {key} is missing"]


def test_what_a_gpu_must_measure_may_be_missing_on_a_cpu_alone(tiny: Path) -> None:
    content = copy.deepcopy(contents(tiny)["future_kl"])
    assert content["cases"][0]["values"]["kernels_ms"] is None
    content["device"] = "cuda"
    content["hardware"] |= {"name": "a GPU", "driver": "1"}
    found = schema.lacks(content)
    assert any("kernels_ms is None" in text for text in found)
    content["hardware"]["driver"] = None
    assert any("driver" in text for text in schema.lacks(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "running"}, "neither done, skipped nor failed"),
        ({"status": SKIPPED, "reason": None}, "without a reason"),
        ({"status": FAILED, "reason": ""}, "without a reason"),
        ({"seconds": None}, "seconds is missing"),
    ],
)
def test_a_case_without_its_end_is_noticed(tiny: Path, change: dict[str, Any], said: str) -> None:
    content = copy.deepcopy(contents(tiny)["memory"])
    content["cases"][0] |= change
    (found,) = [text for text in schema.lacks(content) if said in text]
    assert found.startswith(content["cases"][0]["name"])


def test_what_cannot_run_here_says_why(tiny: Path) -> None:
    skipped = {case["name"]: case["reason"] for case in contents(tiny)["fp8"]["cases"] if case["status"] == SKIPPED}
    assert set(skipped) == {f"{size}: {recipe}" for size in ("7b", "1.5b") for recipe in ("tensorwise", "blockwise")}
    assert all("there is no GPU here" in reason for reason in skipped.values())


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_variants_change_what_they_say_and_nothing_else(tiny: Path) -> None:
    """Layers that are computed again, or lengths with padding, give the same numbers; other logits give others."""
    cases = {case["name"].removeprefix("0.5b: "): case["values"] for case in contents(tiny)["ablate"]["cases"]}
    for name in ("recompute selective", "recompute full", "recompute mlp", "cu_seqlens with padding"):
        assert cases[name]["max_log_prob_difference"] == 0.0
        assert cases[name]["grad_norm_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert cases["recompute full"]["recompute"] == "full"
    # One of the two is what the project does: bfloat16 on a CPU, where the products end in it.
    differences = [cases[f"logits in {dtype}"]["max_log_prob_difference"] for dtype in ("bfloat16", "float32")]
    assert min(differences) == 0.0
    assert 0.0 < max(differences) < 0.5
    assert cases[part_ablate.SAME_MODE]["equal"]


def same_mode_of_a_liar() -> dict[str, Any]:
    """The comparison, with log-probs that are off in their last digits. Runs in a rank of its own."""
    size, packing = models.size_of("0.5b", tiny=True), models.uneven_packing(tiny=True)
    honest = Actor.log_probs

    def off(self: Actor, batches: Any) -> list[torch.Tensor]:
        return [found + 2**-20 * found for found in honest(self, batches)]

    with patched(Actor, log_probs=off), workbench() as bench:
        return part_ablate.same_mode(size, packing, bench)


def test_log_probs_that_are_not_the_updates_own_are_noticed() -> None:
    (values,) = run_ranks(same_mode_of_a_liar, 1)
    assert not values["equal"]
    assert values["equal_when_repeated"]
    assert 0 < values["differing_tokens"] <= values["tokens"]
    assert 0 < values["max_difference"] < 1e-3


def log_probs_of_two_actors() -> list[torch.Tensor]:
    """Of responses, by two actors built one after the other. Runs in a rank of its own."""
    size, packing = models.size_of("0.5b", tiny=True), models.even_packings(tiny=True)[1]
    with workbench() as bench:
        config = bench.config(size, size.built[-1], packing)
        found = []
        for _ in range(2):
            actor = models.build_actor(config, bench.ranks)
            batch = models.make_microbatches(actor, config, packing)[0]
            found.append(actor.log_probs([batch])[0][batch.response_mask])
    return found


def test_random_models_are_no_certainty() -> None:
    """Tied embeddings would have each token predict itself: log-probs must be spread, and the same in every actor."""
    (found,) = run_ranks(log_probs_of_two_actors, 1)
    assert torch.equal(found[0], found[1])
    assert float(found[0].std()) > 1.0
    assert float((found[0] > -0.01).float().mean()) < 0.1


@pytest.mark.parametrize("name", [*SIZES, "32b"])
def test_sizes_are_those_of_the_published_models(name: str) -> None:
    published = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512, "32b": 32_763_876_352}
    size = models.size_of(name, tiny=False)
    from megatron_fipo.convert.hf_config import model_shape
    from megatron_fipo.preflight.parameters import whole_parameters

    assert whole_parameters(model_shape(size.raw(size.layers, 1), "config.json")) == published[name]


def test_a_patch_is_taken_back_and_one_of_nothing_is_a_skip() -> None:
    before = models.LOGIT_STD
    with patched(models, LOGIT_STD=1.0):
        assert models.LOGIT_STD == 1.0
    assert before == models.LOGIT_STD
    with pytest.raises(SkipCase, match="no_such_name"), patched(models, no_such_name=1):
        pass


def test_the_other_process_answers_with_what_arrived() -> None:
    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=receive, args=(theirs, "cpu"))
    thread.start()
    assert ours.recv() == "ready"
    flat = torch.arange(1000).to(torch.uint8)
    answers = []
    for buffer in (flat, flat.clone().index_fill_(0, torch.tensor([7]), 9)):
        ours.send((transport.pack(buffer), True))
        answers.append(ours.recv())
    ours.send(({"neither": "value nor handle"}, True))
    assert "ValueError: a bucket is" in ours.recv()
    ours.send(None)
    thread.join()
    assert answers[0] == digest(flat)
    assert answers[1] != digest(flat), "a changed byte is not noticed"


# --- cases that fail, and processes that die --------------------------------------------------------------------------

DYING = """
import contextlib, os, signal

def case_names(settings):
    return ["good", "raises", "is skipped", "spoils the context", "dies", "after them"]

@contextlib.contextmanager
def prepared(settings):
    yield None

def run_case(name, context, settings):
    from benchmarks.evidence.report import SkipCase
    if name == "raises":
        raise ValueError("a wrong number")
    if name == "is skipped":
        raise SkipCase("not here")
    if name == "spoils the context":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"kind": "made", "process": os.getpid()}
"""


def settings_for(part: str, folder: Path, budget_s: float = 300.0) -> Settings:
    return Settings(part, (), "cpu", True, folder, budget_s, time.time(), "a test")


def test_a_case_that_fails_or_takes_its_process_along_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "benchmarks" / "evidence"  # no package has an __init__: folders of all paths are joined
    package.mkdir(parents=True)
    (package / "part_dying.py").write_text(DYING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.syspath_prepend(tmp_path)
    settings = settings_for("dying", tmp_path)
    assert not gpu_evidence._run(settings)
    cases = {case["name"]: case for case in json.loads(settings.path.read_text())["cases"]}
    statuses = {name: case["status"] for name, case in cases.items()}
    assert statuses == {
        "good": DONE, "raises": FAILED, "is skipped": SKIPPED, "spoils the context": FAILED, "dies": FAILED,
        "after them": DONE,
    }  # fmt: skip
    assert "a wrong number" in cases["raises"]["reason"]
    assert "illegal memory access" in cases["spoils the context"]["reason"]
    assert "exit code -9" in cases["dies"]["reason"]
    assert cases["good"]["values"]["process"] != cases["after them"]["values"]["process"]
    assert not list(tmp_path.glob("*.partial"))


def test_a_part_that_cannot_begin_ends(tmp_path: Path) -> None:
    settings = settings_for("unheard_of", tmp_path)
    assert not gpu_evidence._run(settings)
    (case,) = json.loads(settings.path.read_text())["cases"]
    assert case["status"] == FAILED
    assert "exit code 1" in case["reason"]


def test_no_case_begins_behind_the_budget(tmp_path: Path) -> None:
    settings = settings_for("future_kl", tmp_path, budget_s=0.0)
    gpu_evidence._run(settings)
    cases = json.loads(settings.path.read_text())["cases"]
    assert [case["status"] for case in cases] == [SKIPPED, SKIPPED]
    assert all("budget of 0 s" in case["reason"] for case in cases)


def test_a_case_that_hangs_is_noted(tmp_path: Path) -> None:
    report = Report.begin(settings_for("sync", tmp_path))
    report.plan(["one", "two"])
    report.cases[0]["status"] = "running"
    gpu_evidence._note_lost_case(report, None, hangs=True)
    first, second = Report.read(report.path).cases
    assert first["status"] == FAILED
    assert "was killed" in first["reason"]
    assert second["status"] == "pending"


def test_failing_gpu_tests_are_counted_and_named(tmp_path: Path) -> None:
    file = tmp_path / "test_made.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such device')\ndef test_left(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\n"
        "def test_without_its_fixture(broken): pass\n"
    )
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path), str(file)]
    subprocess.run([*command, "--junitxml", str(junit)], capture_output=True, check=False, timeout=120)
    values = part_tests.read_junit(junit)
    assert [values[key] for key in ("passed", "failed", "errors", "skipped")] == [1, 1, 1, 1]
    assert [failure["test"].split("::")[-1] for failure in values["failures"]] == [
        "test_bad", "test_without_its_fixture",
    ]  # fmt: skip
    assert "1 == 2" in values["failures"][0]["message"]
    assert values["skips"][0]["message"] == "no such device"


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_show_every_case_and_what_was_left_out(tiny: Path) -> None:
    reports = list(contents(tiny).values())
    text = rendering.render(reports)
    for content in reports:
        heading = next(line for line in text.splitlines() if line.startswith(f"### {content['name']}:"))
        assert content["date"][:10] in heading
        assert "no evidence" in heading
        for case in content["cases"]:
            assert case["name"] in text
    assert "there is no GPU here" in text
    rows = [line for line in text.splitlines() if line.startswith("| 0.5b: recompute full |")]
    values = next(
        case["values"] for case in contents(tiny)["ablate"]["cases"] if case["name"].endswith("recompute full")
    )
    assert f"{values['update_ms']:,.1f}" in rows[0]
    assert set(rendering.TABLES) | {"collectives"} == set(schema.PROMISED)


def as_if_on_a_gpu(content: dict[str, Any]) -> dict[str, Any]:
    """For the renderer's test alone: a report that says that it is a GPU's."""
    content = copy.deepcopy(content) | {"device": "cuda", "tiny": False}
    content["hardware"] |= {"name": "Made-up GPU", "count": 1, "driver": "1.2"}
    for case in content["cases"]:
        promised = schema.PROMISED.get(case["values"].get("kind"), {})
        case["values"] |= {
            key: 1.5 for key, rule in promised.items() if rule == schema.ON_GPU and case["values"][key] is None
        }
    return content


def test_only_a_gpus_figures_go_into_the_page(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = tmp_path / "RESULTS.md", tmp_path / "reports"
    shutil.copy(ROOT / "benchmarks" / "RESULTS.md", page)
    before = page.read_text()
    folder.mkdir()

    def render(content: dict[str, Any]) -> int:
        (folder / "future_kl.json").write_text(json.dumps(content))
        sys.argv = ["render_evidence.py", str(folder), "--into", str(page)]
        return render_evidence.main()

    content = contents(tiny)["future_kl"]
    assert render(content) == 1
    assert "no evidence of a GPU" in capsys.readouterr().err
    broken = as_if_on_a_gpu(content)
    del broken["cases"][0]["values"]["call_ms"]
    assert render(broken) == 1
    assert "call_ms is missing" in capsys.readouterr().err
    assert page.read_text() == before
    assert render(as_if_on_a_gpu(content)) == 0
    after = page.read_text()
    assert "### future_kl: 1 × Made-up GPU" in after
    assert "No GPU has run" not in after
    assert after.partition(render_evidence.BEGIN)[0] == before.partition(render_evidence.BEGIN)[0]
    assert after.partition(render_evidence.END)[2] == before.partition(render_evidence.END)[2]
    assert render(as_if_on_a_gpu(content)) == 0, "a second time"
    assert page.read_text() == after


def test_the_page_claims_nothing_that_no_gpu_has_run() -> None:
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    between = page.partition(render_evidence.BEGIN)[2].partition(render_evidence.END)[0]
    assert render_evidence.replaced(page, between) == page
    assert ("No GPU has run" in between) != ("### " in between)
    with pytest.raises(ValueError, match="markers"):
        render_evidence.replaced(page.replace(render_evidence.END, ""), "text")
