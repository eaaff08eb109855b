"""The quick-start's task: problems, worked solutions with mistakes, and the character tokenizer."""

from __future__ import annotations

import filecmp
import runpy
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer, Qwen2Config

from megatron_fipo.data.chain_arithmetic import (
    CHARACTERS,
    VOCABULARY,
    ChainArithmetic,
    ChainProblem,
    WorkedSolutionNoise,
    worked_solution,
)
from megatron_fipo.data.held_out import HELD_OUT_SHARE, is_held_out
from megatron_fipo.verifiers import chain_arithmetic

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
PROBLEM = ChainProblem(operands=(3, 9, 5, 6), operators="+-+")
NO_NOISE = WorkedSolutionNoise(error_rate=0.0, check_rate=0.0, check_error_rate=0.0)


def test_problem_by_hand() -> None:
    assert PROBLEM.prompt == "3+9-5+6="
    assert PROBLEM.running_values() == [3, 12, 7, 13]
    assert PROBLEM.answer == "13"


def test_worked_solution_by_hand() -> None:
    assert worked_solution(PROBLEM, Random(0), NO_NOISE) == "3+9=12;12-5=7;7+6=13;#13"
    always_check = WorkedSolutionNoise(error_rate=0.0, check_rate=1.0, check_error_rate=0.0)
    assert worked_solution(PROBLEM, Random(0), always_check) == "3+9=12?12;12-5=7?7;7+6=13?13;#13"


def test_rechecks_repair_mistakes() -> None:
    noise = WorkedSolutionNoise(
        error_rate=1.0, carry_factor=1.0, plain_factor=1.0, check_rate=1.0, check_error_rate=0.0
    )
    for seed in range(50):
        solution = worked_solution(PROBLEM, Random(seed), noise)
        assert solution.endswith("#13")
        for step, right in zip(solution.split(";"), (12, 7, 13), strict=False):
            first, second = step.split("=")[1].split("?")
            assert int(first) != right, "every first result is a mistake, never the right value by chance"
            assert int(second) == right


def test_solutions_stay_in_range_and_carry_their_mistakes_on() -> None:
    noise = WorkedSolutionNoise(error_rate=1.0, carry_factor=1.0, plain_factor=1.0, check_rate=0.0)
    rng = Random(0)
    for _ in range(300):
        problem = ChainArithmetic(num_terms=8).draw(rng)
        *steps, answer = worked_solution(problem, rng, noise).split(";")
        value = str(problem.operands[0])
        for step in steps:
            left, result = step.split("=")
            assert left.startswith(value), "a step computes on from the value that the solution believes in"
            assert 0 <= int(result) <= 99
            value = result
        assert answer == f"#{value}"


def test_mistakes_are_as_frequent_as_asked_and_more_frequent_with_carries() -> None:
    noise = WorkedSolutionNoise(error_rate=0.25, carry_factor=1.6, plain_factor=0.6, check_rate=0.0)
    rng = Random(0)
    trials = 4000
    plain = sum(worked_solution(ChainProblem((3, 4), "+"), rng, noise) != "3+4=7;#7" for _ in range(trials))
    carry = sum(worked_solution(ChainProblem((8, 4), "+"), rng, noise) != "8+4=12;#12" for _ in range(trials))
    # Four standard deviations of a share of 0.15 or 0.4 in 4000 trials are 0.023 and 0.031.
    assert abs(plain / trials - 0.15) < 0.023
    assert abs(carry / trials - 0.40) < 0.031


def test_problems_stay_in_range() -> None:
    rng = Random(0)
    for num_terms in (2, 7, 20):
        problem = ChainArithmetic(num_terms).draw(rng)
        assert len(problem.operands) == num_terms
        assert all(1 <= operand <= 9 for operand in problem.operands)
        assert all(0 <= value <= 99 for value in problem.running_values())


def test_one_term_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        ChainArithmetic(num_terms=1)


def test_every_length_comes_up_and_one_length_draws_what_it_drew_before() -> None:
    task = ChainArithmetic(num_terms=7, min_terms=2)
    rng = Random(0)
    lengths = [len(task.draw(rng).operands) for _ in range(1200)]
    # Five standard deviations of a share of 1/6 in 1200 are 0.054.
    assert all(abs(lengths.count(length) / 1200 - 1 / 6) < 0.054 for length in range(2, 8))
    assert set(lengths) == set(range(2, 8))
    fixed, ranged = ChainArithmetic(num_terms=4), ChainArithmetic(num_terms=4, min_terms=4)
    assert fixed.draw(Random(5)).prompt == "4-1+4-7=", "the numbers of runs with one length stay"
    assert len(ranged.draw(Random(5)).operands) == 4


@pytest.mark.parametrize("min_terms", [1, 8])
def test_a_shortest_problem_out_of_range_is_refused(min_terms: int) -> None:
    with pytest.raises(ValueError, match=f"min_terms from 2 to num_terms=7, got {min_terms}"):
        ChainArithmetic(num_terms=7, min_terms=min_terms)


def test_warm_start_never_sees_the_held_out_share() -> None:
    task = ChainArithmetic(num_terms=2)
    rng = Random(0)
    training = {task.draw_training(rng).prompt for _ in range(3000)}
    everything = {task.draw(rng).prompt for _ in range(3000)}
    held_out = everything - training
    assert held_out
    assert all(is_held_out(prompt) for prompt in held_out)
    assert not any(is_held_out(prompt) for prompt in training)
    # The control: drawn without the split, held-out problems do come up.
    assert any(is_held_out(prompt) for prompt in everything)


def test_held_out_share_is_the_share_it_says() -> None:
    held_out = sum(is_held_out(f"question {number}") for number in range(20000))
    # Four standard deviations of a share of 1/16 in 20000 are 0.007.
    assert abs(held_out / 20000 - HELD_OUT_SHARE) < 0.007


def test_verifier_and_generator_agree() -> None:
    rng = Random(1)
    for _ in range(50):
        problem = ChainArithmetic().draw(rng)
        solution = worked_solution(problem, rng, NO_NOISE)
        assert chain_arithmetic.verify(solution, problem.answer, "stop").correct
        assert not chain_arithmetic.verify(solution + "1", problem.answer, "stop").correct


@pytest.fixture(params=["alone", "beside a Qwen2 config"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The committed tokenizer. Beside a Qwen2 config, transformers loads it by a class of Qwen2's own."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((QUICKSTART / "base" / name).read_bytes())
    if request.param != "alone":
        Qwen2Config(vocab_size=len(VOCABULARY)).save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_tokenizer_has_one_token_per_character(tokenizer: Any) -> None:
    assert len(tokenizer) == len(VOCABULARY) == 19
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 18)
    assert tokenizer(CHARACTERS)["input_ids"] == list(range(2, 18))
    assert tokenizer("3+9-5=")["input_ids"] == [5, 12, 11, 13, 7, 14]


def test_tokenizer_gives_the_text_back(tokenizer: Any) -> None:
    rng = Random(2)
    noise = WorkedSolutionNoise(error_rate=0.5, check_rate=0.5, check_error_rate=0.5)
    texts = ["".join(rng.choices(CHARACTERS, k=40)) for _ in range(50)]
    for _ in range(50):
        problem = ChainArithmetic().draw(rng)
        texts.append(problem.prompt + worked_solution(problem, rng, noise))
    for text in texts:
        token_ids = tokenizer(text)["input_ids"]
        assert len(token_ids) == len(text)
        assert tokenizer.decode(token_ids) == text
        assert tokenizer.decode([*token_ids, 1, 0, 0], skip_special_tokens=True) == text


def test_tokenizer_maps_other_characters_to_unknown() -> None:
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    if type(tokenizer).__name__ == "Qwen2Tokenizer":
        # Its byte-level BPE drops what it does not know; the data pipeline notices (test_data.py).
        assert tokenizer("3 a\n")["input_ids"] == [5]
    else:
        assert tokenizer("3 a\n")["input_ids"] == [5, 18, 18, 18]


def test_committed_tokenizer_is_what_the_script_writes(tmp_path: Path) -> None:
    script = QUICKSTART / "make_tokenizer.py"
    runpy.run_path(str(script))["build_tokenizer"]().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert filecmp.cmp(tmp_path / name, QUICKSTART / "base" / name, shallow=False), name


def test_task_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, megatron_fipo.data.chain_arithmetic; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
