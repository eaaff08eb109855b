"""Responses of training steps: which are kept, how they are written, and how they are shown."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fipo import cli
from megatron_fipo.config import RewardSection, SamplingSection
from megatron_fipo.rl.advantages import assign_rewards
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from megatron_fipo.rollout.held import Held
from megatron_fipo.run.sample_choice import MAX_REFERENCE_CHARACTERS, choose
from megatron_fipo.run.sample_choice import kept as in_full
from megatron_fipo.run.samples import (
    TrainingSample,
    forget_samples,
    read_samples,
    show_samples,
    write_samples,
)
from megatron_fipo.system.disk import DiskError

PAPER = SamplingSection()
"""What is beyond the batch is thrown away."""


def group(prompt_id: int, scores: str, source: str = "sums", error: str = "") -> Group:
    """One response a letter of `scores`: r is right, w is wrong."""
    samples = [
        Trajectory.of_response(
            prompt_id=prompt_id,
            sample_index=index,
            prompt_ids=torch.tensor([1]),
            response_ids=torch.tensor([prompt_id, index]),
            rollout_log_probs=torch.zeros(2),
            finish_reason="stop",
            accuracy=float(letter == "r"),
            error=error if index == len(scores) - 1 else "",
        )
        for index, letter in enumerate(scores)
    ]
    return Group(Prompt(prompt_id, source, f"{prompt_id}=", (1,), "exact", str(prompt_id)), samples)


def kept(
    trained_on: list[Group], others: list[Group], count: int, config: SamplingSection = PAPER
) -> list[TrainingSample]:
    """What is kept of groups of two ranks; those with an even prompt are the first one's."""
    judged = {id(one): JudgedGroup.of(one, one.prompt.prompt_id % 2) for one in [*others, *trained_on]}
    assign_rewards(list(judged.values()), RewardSection(), max_response_tokens=2)
    in_training = [judged[id(one)] for one in trained_on]
    for one in in_training:
        one.advantages = np.full(len(one.rows), 0.5)
    held = Held.of([*others, *trained_on])
    chosen = choose(in_training, list(judged.values()), count, config)
    assert [one.leader for one in chosen] == [one.prompt_id % 2 for one in chosen]
    return [in_full(3, one, held, decode=lambda ids: f"text of {ids}") for one in chosen]


# --- which are kept ---------------------------------------------------------------------------------------------------


def test_right_and_wrong_ones_of_different_groups_in_turn() -> None:
    trained_on = [group(number, "wwr") for number in range(6)]
    samples = kept(trained_on, [], 4)
    assert [(sample.prompt_id, sample.sample_index, sample.is_right) for sample in samples] == [
        (0, 2, True),
        (1, 0, False),
        (2, 2, True),
        (3, 0, False),
    ]
    first = samples[0]
    assert (first.step, first.source, first.prompt, first.reference) == (3, "sums", "0=", "0")
    assert (first.response, first.tokens, first.finish_reason) == ("text of [0, 2]", 2, "stop")
    assert (first.score, first.reward, first.advantage, first.trained_on) == (1.0, 1.0, 0.5, True)


def test_one_in_four_is_of_a_group_that_was_not_trained_on_and_says_why() -> None:
    trained_on = [group(number, "rw") for number in range(10)]
    others = [group(20, "rr"), group(21, "ww"), group(22, "rw", error="took longer than 10 s"), group(23, "rw")]
    samples = kept(trained_on, others, 16)
    assert [sample.prompt_id for sample in samples] == [*range(10), 20, 21, 22, 23]
    assert [sample.why_not for sample in samples[10:]] == [
        "dropped: all of its 2 responses are right",
        "dropped: all of its 2 responses are wrong",
        "dropped: one of its responses could not be judged (took longer than 10 s)",
        "dropped: the batch was full",
    ]
    assert all(sample.advantage is None and not sample.trained_on for sample in samples[10:])
    assert [sample.prompt_id for sample in kept(trained_on, others, 4)] == [0, 1, 2, 20]
    assert [sample.prompt_id for sample in kept(trained_on, others, 3)] == [0, 1, 2]
    surplus = kept(trained_on, [group(23, "rw")], 4, replace(PAPER, max_surplus_age_steps=1))
    assert surplus[-1].why_not == "left over: the batch was full; kept for the next step"


def test_every_source_is_seen_before_any_is_seen_twice() -> None:
    trained_on = [group(0, "rw"), group(1, "rw"), group(2, "rw", "words"), group(3, "rw", "code")]
    assert [sample.source for sample in kept(trained_on, [], 3)] == ["sums", "words", "code"]


def test_groups_alike_are_trained_on_where_sampling_is_not_dynamic() -> None:
    samples = kept([group(0, "rr"), group(1, "ww")], [], 4, SamplingSection(dynamic=False))
    assert [(sample.prompt_id, sample.is_right, sample.trained_on) for sample in samples] == [
        (0, True, True),
        (1, False, True),
    ]


def test_a_huge_reference_is_cut() -> None:
    long = group(0, "rw")
    long = replace(long, prompt=replace(long.prompt, reference="x" * 50_000))
    (sample,) = kept([long], [], 1)
    assert sample.reference == "x" * MAX_REFERENCE_CHARACTERS + " … (50000 characters)"


# --- files ------------------------------------------------------------------------------------------------------------

SAMPLE = TrainingSample(
    step=7,
    source="sums",
    prompt_id=1,
    sample_index=0,
    prompt="3+9-5=",
    response="3+9=12;12-5=7;#7",
    reference="7",
    answer="7",
    score=1.0,
    reward=1.0,
    advantage=0.25,
    trained_on=True,
    why_not="",
    tokens=17,
    finish_reason="stop",
    error="",
    created_at_step=7,
)
HOSTILE = "a\ud800b\udfff \x1b[31mred\x1b]52;c;cm0=\x07 \u202eevil\u2028line\r\nnext\x00 日本 😀\U000e0001"


def test_texts_come_back_as_they_were_from_files_that_are_safe_to_look_at(tmp_path: Path) -> None:
    rng = random.Random(5)
    # No high surrogate in front of a low one: JSON spells such a pair as it spells the character that it stands for.
    alphabet = [*range(0x250), *range(0xDC00, 0xE010), 0x1F600]
    texts = ["".join(chr(rng.choice(alphabet)) for _ in range(80)) for _ in range(3)]
    samples = [replace(SAMPLE, response=text, answer=text, prompt=text) for text in (HOSTILE, *texts)]
    write_samples(tmp_path / "samples", 7, samples)
    (file,) = (tmp_path / "samples").iterdir()
    assert file.name == "step_000007.jsonl"
    written = file.read_bytes().decode("utf-8")
    assert all(character.isprintable() or character == "\n" for character in written)
    assert "日本 😀" in written, "what can be read stays readable"
    assert [json.loads(line)["step"] for line in written.splitlines()] == [7] * 4
    assert read_samples(tmp_path) == samples


def test_a_step_that_is_made_again_overwrites_its_file_and_later_ones_go(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    for step in (0, 1, 2, 10):
        write_samples(folder, step, [replace(SAMPLE, step=step)])
    before = (folder / "step_000001.jsonl").read_bytes()
    forget_samples(folder, 1)
    assert [path.name for path in folder.iterdir()] == ["step_000000.jsonl"]
    write_samples(folder, 1, [replace(SAMPLE, step=1)])
    assert (folder / "step_000001.jsonl").read_bytes() == before
    forget_samples(tmp_path / "none", 0)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_samples(tmp_path, 7, [SAMPLE])
    before = (tmp_path / "step_000007.jsonl").read_bytes()
    (tmp_path / "step_000007.jsonl.partial").mkdir()
    with pytest.raises(DiskError, match="directory"):
        write_samples(tmp_path, 7, [replace(SAMPLE, response="another")])
    assert (tmp_path / "step_000007.jsonl").read_bytes() == before


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> str:
    for step in (0, 1, 2, 5):
        right = replace(SAMPLE, step=step, created_at_step=step)
        wrong = replace(right, response="#8", answer="8", score=0.0, reward=-1.0, advantage=-0.5)
        words = replace(wrong, source="words", trained_on=False, advantage=None, why_not="dropped: all wrong")
        write_samples(tmp_path / "run/samples", step, [right, wrong, words])
    return str(tmp_path / "run")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["samples", *arguments]) == 0
    return capsys.readouterr().out


def test_the_newest_step_is_shown(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, run)
    assert f"Step 5 of {run}: 3 samples" in text
    assert text.count("✓ correct") == 1
    assert text.count("✗ wrong") == 2
    assert "sums: reward +1; trained on, advantage +0.250" in text
    assert "words: reward -1; dropped: all wrong" in text


@pytest.mark.parametrize(
    ("arguments", "correct", "wrong"),
    [
        (["--right"], 1, 0),
        (["--wrong"], 0, 2),
        (["--source", "words"], 0, 1),
        (["--limit", "2"], 1, 1),
        (["--wrong", "--limit", "1", "--step", "0"], 0, 1),
    ],
)
def test_what_is_shown_can_be_chosen(
    run: str, arguments: list[str], correct: int, wrong: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, run, *arguments)
    assert (text.count("✓ correct"), text.count("✗ wrong")) == (correct, wrong)
    assert f"{correct + wrong} of 3 samples" in text


def test_no_control_code_reaches_the_terminal_and_full_shows_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "\n".join(f"line {number}" for number in range(40))
    write_samples(tmp_path / "samples", 7, [replace(SAMPLE, response=f"{HOSTILE}\n{long}", source="a\x1b[2Jb")])
    text = shown(capsys, str(tmp_path))
    assert "line 20" not in text
    assert "… " in text
    full = shown(capsys, str(tmp_path), "--full")
    assert [number for number in range(40) if f"line {number} " not in full] == []
    for output in (text, full):
        assert all(character.isprintable() or character == "\n" for character in output)
        assert "\\x1b[31mred" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "has no samples of step 3. It has those of steps 0 to 2 and 5."),
        (["--source", "sum"], "is of source 'sum'; there are sums, words."),
        (["--right", "--source", "words"], "none is right"),
    ],
)
def test_what_is_not_there(run: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["samples", run, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_folders_that_are_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/mine").mkdir(parents=True)
    assert cli.main(["samples", "mine"]) == 2
    assert "mine is no folder here. Name the folder of a run, such as outputs/my_run. Did you mean outputs/mine?" in (
        capsys.readouterr().err
    )
    assert cli.main(["samples", "outputs/mine"]) == 2
    error = capsys.readouterr().err
    assert "metrics.num_samples_per_step" in error
    assert "it has no config.yaml" in error
    (tmp_path / "outputs/mine/config.yaml").touch()
    assert cli.main(["samples", "outputs/mine"]) == 2
    assert "it has no config.yaml" not in capsys.readouterr().err


def test_a_damaged_file_is_named_with_its_line(run: str) -> None:
    file = Path(run) / "samples/step_000005.jsonl"
    whole = file.read_bytes()
    of_another_type = whole.splitlines()[0].replace(b'"score": 1.0', b'"score": "high"') + b"\n"
    without_advantage = whole.splitlines()[0].replace(b'"advantage": 0.25', b'"advantage": null') + b"\n"
    assert len({*whole.splitlines(keepends=True), of_another_type, without_advantage}) == 5
    for damage in (b'{"step": 5}\n', b"[1\n", b"\xff\xfe\n", b"[" * 100_000, of_another_type, without_advantage):
        file.write_bytes(whole + damage)
        with pytest.raises(ValueError, match=r"step_000005\.jsonl, line 4 is no sample"):
            show_samples(run, None, None, None, None, full=False)
