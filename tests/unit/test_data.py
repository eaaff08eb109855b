"""Prompt sources, the endless resumable order over them, and the errors users meet."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from transformers import AutoTokenizer, Qwen2Config

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data.held_out import is_held_out
from megatron_fipo.data.prompts import PromptStream, evaluation_prompts

BASE = Path(__file__).parents[2] / "examples" / "quickstart" / "base"
CHAIN = DataSourceConfig(kind="chain_arithmetic", verifier="chain_arithmetic", params={"num_terms": 4})


@pytest.fixture(scope="module", name="tokenizer")
def fixture_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ {'system': '#', 'user': '?', 'assistant': ';'}[m['role']] + m['content'] }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
    )
    return tokenizer


def jsonl(path: Path, rows: list[Any], **settings: Any) -> DataSourceConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return replace(DataSourceConfig(kind="jsonl", path=str(path), verifier="exact"), **settings)


def stream(
    tokenizer: Any, seed: int = 0, overlong: str = "error", limit: int = 64, **sources: DataSourceConfig
) -> PromptStream:
    return PromptStream(sources, tokenizer, seed=seed, max_prompt_tokens=limit, overlong=overlong)


# ------------------------------------------------------------------------------------------------------------ order


def test_jsonl_prompts_by_hand(tokenizer: Any, tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "a.jsonl",
        [{"prompt": "1+1", "answer": 2}, "", {"prompt": "2+2", "answer": {"nested": "4"}}],
        prompt_template="?{prompt}=",
        verifier="judges:verify",
    )
    first, second = evaluation_prompts("a", source, tokenizer, seed=0, max_prompt_tokens=5)
    assert (first.text, first.token_ids, first.reference) == ("?1+1=", (16, 3, 12, 3, 14), 2)
    assert (second.source, second.text, second.verifier) == ("a", "?2+2=", "judges:verify")
    assert second.reference == {"nested": "4"}


def test_every_epoch_holds_every_prompt_once_in_an_order_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": str(number), "answer": ""} for number in range(20)])
    prompts = stream(tokenizer, a=source).take(60)
    assert [prompt.prompt_id for prompt in prompts] == list(range(60))
    epochs = [[int(prompt.text) for prompt in prompts[start : start + 20]] for start in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [p.text for p in stream(tokenizer, a=source).take(60)] == [p.text for p in prompts]
    assert [p.text for p in stream(tokenizer, seed=1, a=source).take(60)] != [p.text for p in prompts]


def test_weights_share_out_each_round(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "answer": ""} for number in range(5)]
    two = jsonl(tmp_path / "two.jsonl", rows, weight=2)
    one = jsonl(tmp_path / "one.jsonl", rows)
    prompts = stream(tokenizer, two=two, one=one).take(30)
    assert [prompt.source for prompt in prompts[:6]] == ["two", "two", "one", "two", "two", "one"]
    counts = Counter((prompt.source, prompt.text) for prompt in prompts)
    assert counts == {("two", str(n)): 4 for n in range(5)} | {("one", str(n)): 2 for n in range(5)}


def test_resuming_goes_on_where_it_stopped(tokenizer: Any, tmp_path: Path) -> None:
    sources = {
        "file": jsonl(tmp_path / "a.jsonl", [{"prompt": str(n), "answer": ""} for n in range(7)]),
        "chain": CHAIN,
    }
    whole = stream(tokenizer, **sources).take(40)
    interrupted = stream(tokenizer, **sources)
    interrupted.take(13)
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = stream(tokenizer, **sources)
    resumed.load_state_dict(state)
    assert resumed.take(27) == whole[13:]
    # Any prompt is a function of its position alone, in whatever order positions are asked for.
    assert [resumed.prompt(position) for position in (39, 0, 21)] == [whole[39], whole[0], whole[21]]
    # The control: without the cursor it would start over.
    assert stream(tokenizer, **sources).take(27) != whole[13:]


def test_endless_source_with_num_prompts_is_a_set_of_that_size(tokenizer: Any) -> None:
    prompts = stream(tokenizer, chain=replace(CHAIN, num_prompts=6)).take(18)
    assert len({prompt.text for prompt in prompts}) == 6
    assert all(len({p.text for p in prompts[start : start + 6]}) == 6 for start in (0, 6, 12))


def test_seed_of_the_source_wins_over_the_run_seed(tokenizer: Any) -> None:
    fixed = replace(CHAIN, seed=5)
    assert stream(tokenizer, seed=0, a=fixed).take(5) == stream(tokenizer, seed=1, a=fixed).take(5)
    assert stream(tokenizer, seed=0, a=CHAIN).take(5) != stream(tokenizer, seed=1, a=CHAIN).take(5)


# --------------------------------------------------------------------------------------------------- held-out share


def test_evaluation_never_repeats_a_training_prompt(tokenizer: Any) -> None:
    # 99 + 9 problems of two terms, about 7 of them held out, so that an overlap could not stay hidden.
    small = replace(CHAIN, params={"num_terms": 2})
    training = {prompt.text for prompt in stream(tokenizer, a=small).take(1500)}
    evaluation = evaluation_prompts("e", replace(small, num_prompts=60), tokenizer, seed=0, max_prompt_tokens=8)
    held_out = {prompt.text for prompt in evaluation}
    assert held_out
    assert not training & held_out
    assert all(is_held_out(text) for text in held_out)
    assert all(prompt.prompt_id < 0 for prompt in evaluation)
    assert len({prompt.prompt_id for prompt in evaluation}) == 60


def test_reasoning_gym_prompts(tokenizer: Any) -> None:
    del tokenizer
    wide = WordTokenizer()
    source = DataSourceConfig(
        kind="reasoning_gym",
        task="chain_sum",
        verifier="reasoning_gym",
        params={"min_digits": 1, "max_digits": 1, "max_terms": 2},
    )
    training = stream(wide, a=source).take(400)
    again = stream(wide, a=source)
    assert [again.prompt(position) for position in (399, 3)] == [training[399], training[3]]
    held_out = evaluation_prompts("e", replace(source, num_prompts=20), wide, seed=0, max_prompt_tokens=64)
    assert not {p.text for p in training} & {p.text for p in held_out}
    reference = training[0].reference
    assert reference["task"] == "chain_sum"
    assert reference["params"] == source.params
    assert reference["entry"]["question"] == training[0].text
    assert eval(training[0].text.split(":")[1].strip(" =")) == int(reference["entry"]["answer"])


class WordTokenizer:
    """A stand-in with an open vocabulary: words by length."""

    chat_template = None
    unk_token_id = None
    unk_token = None

    def __call__(self, text: Any, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [[len(word) for word in item.split(" ")] for item in text]}
        return {"input_ids": [len(text)]}


# ------------------------------------------------------------------------------------------------- parquet and chat


def test_parquet_with_chat_messages_and_a_nested_answer(chat_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": "1+1"}],
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "x": 0,
        },
        {
            "prompt": [
                {"role": "user", "content": "3"},
                {"role": "assistant", "content": "4"},
                {"role": "user", "content": "5"},
            ],
            "reward_model": {"ground_truth": "9", "style": "rule"},
            "x": 1,
        },
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    source = DataSourceConfig(
        kind="parquet",
        path=str(path),
        answer_field="reward_model.ground_truth",
        verifier="math",
        chat_template=True,
        prompt_template="{prompt}-",
        system_prompt="0",
    )
    prompts = evaluation_prompts("p", source, chat_tokenizer, seed=0, max_prompt_tokens=64)
    assert [prompt.text for prompt in prompts] == ["#0?1+1-=", "#0?3;4?5-="]
    assert [prompt.reference for prompt in prompts] == ["2", "9"]
    one = evaluation_prompts("p", replace(source, num_prompts=1), chat_tokenizer, seed=0, max_prompt_tokens=64)
    assert [prompt.text for prompt in one] == ["#0?1+1-="]
    with pytest.raises(ValueError, match=r"no column 'answers'; it has prompt, reward_model, x\."):
        stream(chat_tokenizer, p=replace(source, answer_field="answers"))
    with pytest.raises(ValueError, match=r"row 0 has no column 'reward_model.truth'.*'reward_model.ground_truth'\?"):
        stream(chat_tokenizer, p=replace(source, answer_field="reward_model.truth"))
    with pytest.raises(ValueError, match=r"row 1 holds a conversation of 3 messages.*set chat_template=true"):
        stream(chat_tokenizer, p=replace(source, chat_template=False, system_prompt=""))


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "holds no prompts"),
        (["", " "], {}, "holds no prompts"),
        ([{"prompt": "1", "answer": ""}, '{"prompt": '], {}, r"a\.jsonl:2 is not valid JSON: .* at column \d+"),
        (["[1]"], {}, r"a\.jsonl:1 holds a JSON list"),
        (
            [{"prompt": "1", "answr": "2"}],
            {},
            r"a\.jsonl:1 has no column 'answer'; it has prompt, answr\. Did you mean 'answr'",
        ),
        ([{"prompt": "1", "a": {"b": 1}}], {"answer_field": "a.c"}, r"no column 'a\.c'; it has prompt, a, a\.b\."),
        ([{"prompt": "", "answer": ""}], {}, r"a\.jsonl:1: column 'prompt' holds ''"),
        ([{"prompt": [{"text": "1"}], "answer": ""}], {}, "a list of chat messages with role and content"),
        ([{"prompt": "1", "answer": None}], {}, r"a\.jsonl:1: column 'answer' is null"),
        ([{"prompt": "1 a", "answer": ""}], {}, r"a\.jsonl:1: the model's tokenizer does not know ' ', 'a'"),
        ([{"prompt": "1", "answer": ""}], {"prompt_template": "?"}, r"prompt_template=\?: must hold \{prompt\}"),
        ([{"prompt": "1", "answer": ""}], {"chat_template": True}, "tokenizer has no chat template"),
        (
            [{"prompt": "1", "answer": ""}],
            {"system_prompt": "1"},
            "chat_template=false leaves it out. Set chat_template=true",
        ),
        (
            [{"prompt": "1", "answer": ""}],
            {"verifier": "exakt"},
            "verifier=exakt: must be .* Did you mean exact",
        ),
        ([{"prompt": "1", "answer": ""}], {"kind": "json"}, "kind=json: must be one of .*Did you mean jsonl"),
        ([{"prompt": "1", "answer": ""}], {"params": {"x": 1}}, "kind=jsonl takes no parameters"),
        ([{"prompt": "1", "answer": ""}], {"num_prompts": 0}, "num_prompts=0: must be at least 1"),
        ([{"prompt": "1", "answer": ""}], {"weight": 0}, "weight=0: must be at least 1"),
    ],
)
def test_file_errors_name_source_place_and_rule(
    tokenizer: Any, tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str
) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows, **settings)
    with pytest.raises(ValueError, match=rf"(?s)data source 'mine'.*{message}"):
        stream(tokenizer, mine=source)


def test_missing_file_and_no_source(tokenizer: Any, tmp_path: Path) -> None:
    source = DataSourceConfig(kind="jsonl", path=str(tmp_path / "none.jsonl"), verifier="exact")
    with pytest.raises(ValueError, match=r"none\.jsonl' does not exist"):
        stream(tokenizer, mine=source)
    with pytest.raises(ValueError, match="path is empty: kind=jsonl reads a file"):
        stream(tokenizer, mine=replace(source, path=""))
    with pytest.raises(ValueError, match=r"data\.train names no source"):
        stream(tokenizer)


def test_overlong_prompts_stop_or_are_skipped(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "1" * length, "answer": ""} for length in (3, 6, 5, 7)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"a\.jsonl:2: the prompt has 6 tokens, over rollout\.max_prompt_tokens=5 \(and so are 1 more\)\. .*skip",
    ):
        stream(tokenizer, limit=5, mine=source)
    skipping = stream(tokenizer, limit=5, overlong="skip", mine=source)
    assert Counter(len(prompt.token_ids) for prompt in skipping.take(8)) == {3: 4, 5: 4}
    assert skipping.num_skipped == {"mine": 2}
    with pytest.raises(ValueError, match=r"data source 'mine': every one of its 4 prompts is longer .*=2"):
        stream(tokenizer, limit=2, overlong="skip", mine=source)


def test_overlong_procedural_prompts_stop_or_end(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"chain_arithmetic, item 0: the prompt has 8 tokens, over .*=7"):
        stream(tokenizer, limit=7, mine=CHAIN)
    with pytest.raises(ValueError, match=r"no prompt found in 1024 attempts .*max_prompt_tokens=7 leaves none"):
        stream(tokenizer, limit=7, overlong="skip", mine=CHAIN)


def test_dropped_characters_are_noticed_where_the_tokenizer_has_no_unknown_token(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BASE / name).read_bytes())
    Qwen2Config(vocab_size=19).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 1\n=", "answer": ""}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the model's tokenizer does not know '\\n', ' '"):
        stream(tokenizer, mine=source)


def test_procedural_errors(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"has the parameters num_terms and min_terms; got {'terms': 3}"):
        stream(tokenizer, mine=replace(CHAIN, params={"terms": 3}))
    with pytest.raises(ValueError, match=r"evaluation source 'e' is endless \(chain_arithmetic\); set its num_prompts"):
        evaluation_prompts("e", CHAIN, tokenizer, seed=0, max_prompt_tokens=64)
    gym = DataSourceConfig(kind="reasoning_gym", task="chain_sums", verifier="reasoning_gym")
    with pytest.raises(ValueError, match=r"no task 'chain_sums'.*Did you mean 'chain_sum'"):
        stream(WordTokenizer(), mine=gym)
    with pytest.raises(ValueError, match=r"does not take the parameters {'digits': 1}"):
        stream(WordTokenizer(), mine=replace(gym, task="chain_sum", params={"digits": 1}))
    with pytest.raises(ValueError, match="'seed' is not a parameter of task chain_sum"):
        stream(WordTokenizer(), mine=replace(gym, task="chain_sum", params={"seed": 1}))
    with pytest.raises(ValueError, match=r"verifier=math: .*are judged by their own task. Set verifier=reasoning_gym"):
        stream(WordTokenizer(), mine=replace(gym, task="chain_sum", verifier="math"))
