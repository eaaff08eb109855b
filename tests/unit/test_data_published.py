"""Public data sets in their published schemas, repetitions, and procedural tasks of many domains."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_fipo.config import ConfigError, DataSourceConfig, load_config, validate
from megatron_fipo.data.prompts import PromptStream, evaluation_prompts
from megatron_fipo.data.records import read_records
from megatron_fipo.verifiers.registry import load_verifier
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
CHECK = "def check(candidate):\n    assert candidate(1) == 1\n"
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


class CharacterTokenizer:
    """Every character is its own token; a chat is written as "<user>…<assistant>"."""

    chat_template = "yes"
    unk_token_id = None
    unk_token = None

    def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [[ord(character) for character in item] for item in text]}
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def dapo_row(problem: str, answer: str, index: str = "0") -> dict[str, Any]:
    """A row of DAPO-Math-17k as it is published."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": BEFORE + problem + AFTER, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> DataSourceConfig:
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    source = DataSourceConfig(kind="parquet", path=str(path), schema="dapo_math", verifier="math_answer")
    return replace(source, **settings)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> DataSourceConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return replace(DataSourceConfig(kind="jsonl", path=str(path), verifier="math"), **settings)


def repeated(path: Path) -> DataSourceConfig:
    """Three problems, four times each, in turns; the last of the second problem has another answer."""
    rows = [dapo_row(f"What is {n}+{n}?", str(2 * n), f"{n}-{copy}") for copy in range(4) for n in range(3)]
    rows[10]["reward_model"]["ground_truth"] = "3"
    return write_parquet(path, rows)


def texts(source: DataSourceConfig, **settings: Any) -> list[str]:
    prompts = evaluation_prompts("s", source, CharacterTokenizer(), seed=0, max_prompt_tokens=10_000, **settings)
    return [prompt.text for prompt in prompts]


# ---------------------------------------------------------------------------------------------------- repetitions


def test_repeated_prompts_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = repeated(tmp_path / "dapo.parquet")
    file = read_records(source)
    assert [record.reference for record in file.records] == ["0", "2", "4"]
    assert [record.place.rpartition(", ")[2] for record in file.records] == ["row 0", "row 1", "row 2"]
    assert (file.num_duplicates, file.num_conflicts) == (9, 1)
    with caplog.at_level(logging.WARNING):
        stream = PromptStream({"dapo": source}, CharacterTokenizer(), seed=0, max_prompt_tokens=10_000)
    assert stream.num_duplicates == {"dapo": 9}
    assert "left out 9 rows that repeat a prompt; of them 1 with another answer than the first, 3 left" in caplog.text
    # The control: without it, every row counts.
    everything = read_records(replace(source, deduplicate=False))
    assert (len(everything.records), everything.num_duplicates, everything.num_conflicts) == (12, 0, 0)


def test_num_prompts_counts_different_prompts(tmp_path: Path) -> None:
    rows = [dapo_row("A", "1")] * 5 + [dapo_row("B", "2"), dapo_row("A", "1"), dapo_row("C", "3")]
    source = write_parquet(tmp_path / "a.parquet", rows, num_prompts=2)
    assert [record.reference for record in read_records(source).records] == ["1", "2"]
    last = read_records(replace(source, num_prompts=3)).records
    assert last[2].reference == "3"
    assert last[2].place.endswith("row 7")


def test_repetitions_across_parquet_batches(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number % 3000}", "answer": f"{number % 3000}"} for number in range(10_000)]
    source = write_parquet(tmp_path / "a.parquet", rows, schema="columns")
    file = read_records(source)
    assert [record.prompt for record in file.records] == [str(number) for number in range(3000)]
    assert file.num_duplicates == 7000
    assert file.records[2999].reference == "2999"


def test_jsonl_repetitions_ignore_white_space_at_the_ends(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": " a\n", "answer": 1}, {"prompt": "A", "answer": 1}]
    file = read_records(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [record.prompt for record in file.records] == ["a", "A"]
    assert (file.num_duplicates, file.num_conflicts) == (1, 0)


def test_shuffle_of_different_prompts_resumes(tmp_path: Path) -> None:
    rows = [dapo_row(f"{n}", str(n)) for n in range(7)] * 3
    source = write_parquet(tmp_path / "a.parquet", rows)

    def stream(source: DataSourceConfig = source) -> PromptStream:
        return PromptStream({"a": source}, CharacterTokenizer(), seed=3, max_prompt_tokens=10_000)

    whole = [prompt.reference for prompt in stream().take(21)]
    assert all(sorted(whole[start : start + 7]) == [str(n) for n in range(7)] for start in (0, 7, 14))
    first = stream()
    first.take(9)
    resumed = stream()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [prompt.reference for prompt in resumed.take(12)] == whole[9:]
    # The control: with the repetitions the cursor would mean another prompt, and says so.
    with pytest.raises(ValueError, match="has 21 prompts, and had 7 when the checkpoint was saved"):
        stream(replace(source, deduplicate=False)).load_state_dict(first.state_dict())


# -------------------------------------------------------------------------------------------------------- schemas


def test_dapo_math_as_chat_and_as_raw_text(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [dapo_row("1+1?", "2")])
    assert texts(replace(source, chat_template=True)) == [f"<user>{BEFORE}1+1?{AFTER}<assistant>"]
    assert texts(source) == [f"{BEFORE}1+1?{AFTER}"]
    assert texts(replace(source, prompt_template="Q: {prompt}\nA:")) == [f"Q: {BEFORE}1+1?{AFTER}\nA:"]
    two = [{**dapo_row("", "2"), "prompt": [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]}]
    with pytest.raises(ValueError, match="row 0 holds a conversation of 3 messages"):
        texts(write_parquet(tmp_path / "b.parquet", two))


@pytest.mark.parametrize(
    ("schema", "row", "prompt", "reference"),
    [
        ("aime", {"id": 1, "problem": "P", "answer": "073"}, "P", "073"),
        ("aime", {"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 73}, "P", 73),
        ("aime", {"question": "P", "answer": "336^\\circ"}, "P", "336^\\circ"),
        ("aime", {"problem": "P", "expected_answer": "73", "reference_solution": "S"}, "P", "73"),
        ("gsm8k", {"question": "Q", "answer": "4*4=<<4*4=16>>16\n#### 1,016"}, "Q", "1,016"),
        ("gsm8k", {"question": "Q", "answer": "18"}, "Q", "18"),
        (
            "humaneval",
            {
                "task_id": "HumanEval/0",
                "prompt": "def f(x):\n",
                "canonical_solution": "",
                "test": CHECK,
                "entry_point": "f",
            },
            "def f(x):\n",
            {"prompt": "def f(x):\n", "tests": CHECK, "entry_point": "f"},
        ),
        (
            "mbpp",
            {
                "task_id": 1,
                "text": "Add.",
                "code": "",
                "test_list": ["assert f(1)", "assert f(2)"],
                "test_setup_code": "",
            },
            "Add.\n\nYour code should pass these tests:\nassert f(1)\nassert f(2)",
            {"tests": "\nassert f(1)\nassert f(2)"},
        ),
        (
            "mbpp",
            {"prompt": "Add.", "test_list": ["assert f(1)"], "test_imports": ["import math"]},
            "Add.\n\nYour code should pass these tests:\nassert f(1)",
            {"tests": "import math\nassert f(1)"},
        ),
        (
            "mbpp",
            {"task_id": "MBPP/11", "prompt": "Add.", "test": "assert f(1)"},
            "Add.\n\nYour code should pass these tests:\nassert f(1)",
            {"tests": "\nassert f(1)"},
        ),
        ("dapo_math", dapo_row("1", "2"), [{"content": BEFORE + "1" + AFTER, "role": "user"}], "2"),
    ],
)
def test_published_rows(tmp_path: Path, schema: str, row: dict[str, Any], prompt: Any, reference: Any) -> None:
    settings = {"schema": schema, "verifier": "code" if schema in ("humaneval", "mbpp") else "math"}
    for source in (
        write_jsonl(tmp_path / "a.jsonl", [row], **settings),
        write_parquet(tmp_path / "a.parquet", [row], **settings),
    ):
        (record,) = read_records(source).records
        assert (record.prompt, record.reference) == (prompt, reference)


def test_code_references_are_what_the_code_verifier_reads(tmp_path: Path) -> None:
    from megatron_fipo.verifiers.verdict import VerifierJob

    row = {"prompt": "def f(x):\n", "test": "def check(c):\n    assert c(1) == 2\n", "entry_point": "f"}
    source = write_jsonl(tmp_path / "a.jsonl", [row], schema="humaneval", verifier="code")
    (record,) = read_records(source).records
    verifier = load_verifier("code")
    assert isinstance(verifier, JobVerifier)
    assert verifier.judge(VerifierJob("code", "    return x + 1", record.reference), 10.0).correct
    assert not verifier.judge(VerifierJob("code", "    return x + 2", record.reference), 10.0).correct


def test_schema_errors_name_file_column_and_remedy(tmp_path: Path) -> None:
    rows = [{"question": "Q", "answer": "1"}]
    source = write_jsonl(tmp_path / "a.jsonl", rows, schema="dapo_math")
    with pytest.raises(ValueError, match=r"a\.jsonl:1 has no column 'prompt'; it has question, answer\. Set .*schema"):
        read_records(source)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'problem' or 'Problem' or 'question'; it has da"):
        read_records(write_parquet(tmp_path / "a.parquet", [dapo_row("1", "2")], schema="aime"))
    broken = {**dapo_row("1", "2"), "reward_model": {"style": "rule"}}
    with pytest.raises(ValueError, match=r"row 0: the answer \(schema dapo_math\) is null"):
        read_records(write_parquet(tmp_path / "b.parquet", [broken]))
    with pytest.raises(ValueError, match=r"schema=dapo: must be one of columns, dapo_math"):
        texts(write_jsonl(tmp_path / "a.jsonl", rows, schema="dapo"))


def test_a_line_of_configuration_is_enough(tmp_path: Path) -> None:
    source = repeated(tmp_path / "dapo.parquet")
    settings = f"kind: parquet, path: {source.path}, schema: dapo_math, chat_template: true, verifier: math_answer"
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: x}}\ndata:\n  train:\n    dapo: {{{settings}}}\n")
    config = load_config(path)
    validate(config)
    stream = PromptStream.from_config(config, CharacterTokenizer())
    assert sorted(prompt.reference for prompt in stream.take(3)) == ["0", "2", "4"]
    refusals = {
        "data.train.dapo.schema=dapo": "Did you mean dapo_math?",
        "data.train.dapo.answer_field=solution": "schema=dapo_math knows its columns",
        "data.train.dapo.verifier=http//x": "must be one of",
    }
    for override, message in refusals.items():
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
            validate(load_config(path, [override]))
    validate(load_config(path, ["data.train.dapo.verifier='http://localhost:8000/score'"]))
    sums = "{kind: chain_arithmetic, verifier: chain_arithmetic, schema: aime}"
    with pytest.raises(ConfigError, match="kind=chain_arithmetic reads no file"):
        validate(load_config(path, [f"data.train.sums={sums}"]))


# ----------------------------------------------------------------------------------------------- procedural tasks

COMPOSITE = {
    "datasets": [
        {"name": "leg_counting", "weight": 2.0, "config": {"max_animals": 3}},
        {"name": "count_bits", "weight": 1.0, "config": {"max_n": 100}},
    ]
}


@pytest.mark.parametrize(
    ("task", "params"),
    [
        ("knights_knaves", {"n_people": 2}),  # logic
        ("zebra_puzzles", {"num_people": 3, "num_characteristics": 3}),
        ("number_sorting", {"max_numbers": 4}),  # algorithms
        ("word_ladder", {"min_word_length": 3, "max_word_length": 3}),
        ("spell_backward", {}),
        ("countdown", {"min_numbers": 3, "max_numbers": 3}),  # games
        ("mini_sudoku", {"min_empty": 3, "max_empty": 4}),
        ("tower_of_hanoi", {"max_disks": 3}),
        ("bf", {"difficulty": 1}),  # code
        ("codeio", {}),
        ("composite", COMPOSITE),
    ],
)
def test_procedural_tasks_of_every_domain(task: str, params: dict[str, Any]) -> None:
    source = DataSourceConfig(
        kind="reasoning_gym", task=task, params=params, verifier="reasoning_gym", num_prompts=8, seed=1
    )
    stream = PromptStream({"t": source}, CharacterTokenizer(), seed=0, max_prompt_tokens=100_000)
    again = PromptStream({"t": source}, CharacterTokenizer(), seed=5, max_prompt_tokens=100_000)
    prompts = stream.take(3)
    assert [prompt.text for prompt in prompts] == [again.prompt(position).text for position in range(3)]
    verify = load_verifier("reasoning_gym")
    assert not isinstance(verify, JobVerifier)
    for prompt in prompts:
        answer = prompt.reference["entry"]["answer"]
        assert verify(f"Thinking.\n<answer>{answer}</answer>", prompt.reference, "stop").correct
        wrong = verify("<answer>none of these</answer>", prompt.reference, "stop")
        assert isinstance(wrong, Verdict)
        assert not wrong.correct


def test_composite_mixes_its_tasks() -> None:
    source = DataSourceConfig(kind="reasoning_gym", task="composite", params=COMPOSITE, verifier="reasoning_gym")
    prompts = PromptStream({"t": source}, CharacterTokenizer(), seed=0, max_prompt_tokens=100_000).take(60)
    names = [prompt.reference["entry"]["metadata"]["source_dataset"] for prompt in prompts]
    assert set(names) == {"leg_counting", "count_bits"}
    assert names.count("leg_counting") > names.count("count_bits")
