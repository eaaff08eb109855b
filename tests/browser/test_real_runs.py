"""Pages on real runs: the quick-start as `make demo` trains it, and FIPO beside DAPO over three seeds."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_fipo import config as configuration
from megatron_fipo.evaluation.chat import Chat, ChatOptions
from megatron_fipo.report.credit import OUTSIDE_THE_SUM
from megatron_fipo.rl.future_kl import future_kl
from megatron_fipo.rl.objective import influence_weights
from megatron_fipo.traces.files import read_trace, trace_files
from megatron_fipo.traces.schema import TracedResponse
from megatron_fipo.verifiers import chain_arithmetic
from tests.browser.conftest import NARROW, WIDE, Opened, OpenPage
from tests.browser.test_appearance import CONTRAST, LEAST_CONTRAST
from tests.browser.test_figures import FIGURES_WITHOUT_MARKS
from tests.end_to_end.runs import BASE, ROOT, run_command, train

pytestmark = pytest.mark.browser

TIMEOUT_S = 900.0
TOLERANCE = 1e-6
LOOKS = pytest.mark.parametrize(
    ("size", "scheme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide and light", "narrow and dark"]
)
CHAT = re.compile(r'megatron-fipo chat outputs/quickstart/huggingface --prompt "([^"]+)"')
"""As the README and the tutorial show it."""


@dataclass(frozen=True)
class Demo:
    """What `make demo` left behind."""

    folder: Path
    output: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The documented run in full, minutes long, by the README's command."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = ["make", "--no-print-directory", "demo", f"ARGS=run.output_dir={folder}"]  # make may run the tests, too
    code, output = run_command(command, TIMEOUT_S, mark=str(folder))
    assert code == 0, output[-6000:]
    return Demo(folder, output)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on FIPO and DAPO, three seeds each, some steps short."""
    root = tmp_path_factory.mktemp("comparison")
    folders = []
    for algorithm in ("fipo", "dapo"):
        for seed in range(3):
            folders.append(root / f"{algorithm}_{seed}")
            settings = (
                f"algorithm={algorithm}",
                f"run.seed={seed}",
                f"run.name={algorithm}_{seed}",
                "train.num_steps=4",
                "train.num_minibatches=4",
                "train.num_epochs=2",
                "optimizer.num_warmup_steps=1",
                "optimizer.learning_rate=2.0e-4",  # so few steps come to different models by this
                "data.evaluation.held_out.num_prompts=16",
                "evaluation.num_samples_per_prompt=2",
                "objective.shadow={tau_128: {half_life_tokens: 128}}",
            )
            train(folders[-1], *settings, world_size=1, expected=0)
    page = root / "comparison.html"
    program = str(Path(sys.executable).with_name("megatron-fipo"))
    command = [program, "report", *map(str, folders), "-o", str(page)]
    code, output = run_command(command, TIMEOUT_S, mark=str(root))
    assert code == 0, output
    return page


def figures_of(opened: Opened) -> int:
    """Draw every figure; the number of them, none of which is empty."""
    opened.draw_all()
    assert opened.run(FIGURES_WITHOUT_MARKS) == []
    width = opened.run("innerWidth")
    assert opened.run("document.documentElement.scrollWidth") == width
    contrast = opened.run(CONTRAST)
    assert contrast[0][0] >= LEAST_CONTRAST, contrast[:5]
    return int(opened.run("document.querySelectorAll('figure').length"))


def test_the_demo_ends_with_its_report(demo: Demo) -> None:
    last = demo.output.strip().splitlines()[-1]
    page = demo.folder / "report.html"
    assert re.fullmatch(rf"{re.escape(str(page))} \([\d.]+ MB\): open it in a browser; it needs no network\.", last)
    assert page.stat().st_size > 4_000_000, "the plotting library is within"


@LOOKS
def test_the_page_of_the_demo(demo: Demo, size: tuple[int, int], scheme: str, open_file: OpenPage) -> None:
    opened = open_file(demo.folder / "report.html", size, scheme)
    assert figures_of(opened) >= 20
    levels = opened.page.locator(".card .level").all_inner_texts()
    assert "Good" in levels, "it learns"
    assert "Warning" not in levels
    run = opened.run("window.report.data()")["runs"][0]
    assert run["state"] == "finished"
    assert run["evaluations"][-1]["avg"] > run["evaluations"][0]["avg"]


def by_python(one: TracedResponse, half_life: float, config: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """(F, f) of a traced response by the trainer's own functions."""
    shift = torch.from_numpy(one.log_prob_shifts.copy())
    in_sum = [reason not in OUTSIDE_THE_SUM for reason in one.left_out_tokens]
    counted = torch.tensor(in_sum) & torch.from_numpy(one.participates.copy())
    sums = future_kl(torch.where(counted, shift, 0.0), torch.tensor([0, len(shift)]), half_life)
    weights = influence_weights(sums, shift.exp(), torch.full_like(shift, one.advantage), config)
    return sums.numpy(), weights.numpy()


def test_the_slider_gives_the_trainers_numbers(demo: Demo, open_file: OpenPage) -> None:
    """On each traced response of the demonstration: what the trainer had, and its functions at other half-lives."""
    opened = open_file(demo.folder / "report.html")
    data = opened.run("window.report.data()")
    objective = data["runs"][0]["objective"]
    config = configuration.load_config(demo.folder / "config.yaml").objective
    traced = {
        (one.step, one.update, one.prompt_id, one.sample_index): one
        for path in trace_files(demo.folder / "traces").values()
        for one in read_trace(path).responses
    }
    script = """([name, advantage, halfLife, objective]) => {
      const { arrays } = JSON.parse(document.getElementById(name).textContent);
      const [shift, participates, inSum] = ["shift", "participates", "in_suffix_sum"]
        .map((array) => window.report.decodeArray(array, arrays[array]));
      const found = window.report.recompute(shift, participates, inSum, advantage, halfLife, objective);
      return [[...found.futureKl], [...found.influenceWeights]];
    }"""
    num_compared, largest = 0, 0.0
    for group in data["runs"][0]["groups"]:
        for response in group["responses"]:
            if response["tokens"] is None:
                continue
            one = traced[group["step"], group["update"], group["prompt_id"], response["sample_index"]]
            own = objective["half_life_tokens"]
            for half_life in (own, 4.0, 128.0):
                told = [response["tokens"], response["advantage"], half_life, objective]
                sums, weights = (np.array(values) for values in opened.run(script, told))
                wanted = by_python(one, half_life, config)
                assert np.abs(sums - wanted[0]).max() <= TOLERANCE
                assert np.abs(weights - wanted[1]).max() <= TOLERANCE
                if half_life == own:
                    assert np.abs(sums - one.future_kl).max() <= TOLERANCE
                    assert np.abs(weights - one.influence_weights).max() <= TOLERANCE
                    largest = max(largest, np.abs(sums - by_python(one, own * 1.01, config)[0]).max())
                    num_compared += 1
    assert num_compared > 100
    assert largest > 100 * TOLERANCE, "a half-life that is a hundredth off is noticed"


@LOOKS
def test_the_page_of_fipo_beside_dapo(
    comparison: Path, size: tuple[int, int], scheme: str, open_file: OpenPage
) -> None:
    opened = open_file(comparison, size, scheme)
    assert figures_of(opened) >= 15
    data = opened.run("window.report.data()")
    assert [run["state"] for run in data["runs"]] == ["finished"] * 6
    legend = opened.page.locator("#toolbar").inner_text()
    assert all(re.search(rf"{algorithm}\s+3 seeds", legend) for algorithm in ("fipo", "dapo"))
    rows = [
        row.locator("th, td").all_text_contents()
        for row in opened.page.get_by_role("table", name="Paired differences").locator("tbody tr").all()
    ]
    assert all("fipo − dapo" in cells for cells in rows)
    assert {cells[-2] for cells in rows} == {"3 seeds", "16 problems"}, "by what they are paired"
    told = [cell for cells in rows for cell in cells]
    assert any(re.search(r"\[\S+, \S+\]", cell) for cell in told), "the two come to different numbers"


def test_the_demo_keeps_its_promise(demo: Demo) -> None:
    """The model that the README trains answers every prompt that the README, the tutorial and the run itself show."""
    (proposed,) = re.findall(r"^ *Try: (.+)$", demo.output, re.MULTILINE)
    prompts = {*proposed.split()}
    for page in ("README.md", "docs/tutorial.md"):
        documented = CHAT.findall((ROOT / page).read_text())
        assert documented, f"{page} shows how to talk to the model"
        prompts.update(documented)
    assert "3+9-5=" in prompts
    assert all(re.fullmatch(r"[0-9+-]+=", prompt) for prompt in prompts)
    chat = Chat(demo.folder / "huggingface", ChatOptions(temperature=0.0), io.StringIO())
    wrong = {}
    for prompt in sorted(prompts):
        answer = chat.answer(prompt)
        right = eval(prompt.removesuffix("="), {"__builtins__": {}})  # digits and signs of this project's own pages
        if not chain_arithmetic.verify(answer, str(right), "stop").correct:
            wrong[prompt] = answer
    assert not wrong
    untrained = Chat(ROOT / BASE, ChatOptions(temperature=1.0, seed=0), io.StringIO())
    answers = [untrained.answer("6+6+5+8+8-6-8=") for _ in range(16)]
    assert not all(chain_arithmetic.verify(answer, "5", "stop").correct for answer in answers), "there was to learn"
