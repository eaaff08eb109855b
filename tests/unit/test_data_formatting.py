"""From rows to tokens with real tokenizers: one beginning of sequence, chat templates that fail, unknown tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data import chat_templates
from megatron_fipo.data.formatting import raw_token_ids
from megatron_fipo.data.prompts import PromptStream, evaluation_prompts
from megatron_fipo.rl.trajectory import Prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS = 2


def tokenizer(chat_template: str | None = None, adds_bos: bool = True) -> Any:
    """Bytes as tokens, and a beginning of sequence that raw text gets by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=262, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["1+1="], trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    fast.chat_template = chat_template
    return fast


@pytest.fixture
def source(tmp_path: Path) -> DataSourceConfig:
    return rows(tmp_path, {"prompt": "hi", "answer": "1"}, {"prompt": "ho", "answer": "2"})


def rows(folder: Path, *values: dict[str, str]) -> DataSourceConfig:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, values)))
    return DataSourceConfig(kind="jsonl", path=str(path), verifier="math")


def prompts(using: Any, source: DataSourceConfig, vocab_size: int | None = None, **settings: Any) -> list[Prompt]:
    return evaluation_prompts(
        "q", replace(source, **settings), using, seed=0, max_prompt_tokens=64, vocab_size=vocab_size
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt_template": "<bos><|user|>{prompt}<|end|><|assistant|>"},
        {"prompt_template": "<bos>{prompt}"},
        {"prompt_template": " <|user|>{prompt}"},
    ],
)
def test_raw_text_has_one_beginning_of_sequence(source: DataSourceConfig, settings: dict[str, str]) -> None:
    for prompt in prompts(tokenizer(), source, **settings):
        assert prompt.token_ids[0] == BOS
        assert prompt.token_ids.count(BOS) == 1


def test_data_and_chats_have_one_too_and_what_stands_inside_stays(tmp_path: Path, source: DataSourceConfig) -> None:
    assert all(p.token_ids.count(BOS) == 1 for p in prompts(tokenizer(CHAT), source, chat_template=True))
    (prompt,) = prompts(tokenizer(), rows(tmp_path, {"prompt": "<bos>a<bos>b", "answer": "1"}))
    assert [id == BOS for id in prompt.token_ids] == [True, False, True, False]
    # A tokenizer that adds none leaves what was written.
    assert raw_token_ids(tokenizer(adds_bos=False), ["<bos>a", "a"]) == [[BOS, 70], [70]]


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (
            "{{ raise_exception('no system role') }}" + CHAT,
            {"system_prompt": "Be good."},
            "no system role.*leave out system_prompt",
        ),
        ("{{ raise_exception('never') }}", {}, r"TemplateError: never\)\. Mend the template"),
        ("{% for m in messages %}{{ m }", {}, "TemplateSyntaxError"),
        ("{{ messages[9].content.x }}", {}, "UndefinedError"),
        ("{{ 1 // 0 }}", {}, "ZeroDivisionError"),
        ("{{ messages + 1 }}", {}, "TypeError"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__() }}", {}, "SecurityError"),
    ],
)
def test_a_template_that_fails_is_named(
    source: DataSourceConfig, template: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"data source 'q': .*rows\.jsonl:1: .*{message}"):
        prompts(tokenizer(template), source, chat_template=True, **settings)


def test_a_template_that_fails_for_one_row_names_the_row(tmp_path: Path) -> None:
    template = "{% if messages[0]['content'] == 'two' %}{{ raise_exception('not two') }}{% endif %}" + CHAT
    data = rows(tmp_path, {"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "2"})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the tokenizer's chat template fails .*not two"):
        prompts(tokenizer(template), data, chat_template=True)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
        "{% set x = messages | length + 9 %}{{ x ** (x ** (x + 2)) }}",
    ],
    ids=["loop", "loop with text", "one expression"],
)
def test_a_template_that_never_ends_is_refused(
    source: DataSourceConfig, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_templates, "LIMIT_S", 1.0)
    with pytest.raises(
        ValueError, match=r"data source 'q': .*rows\.jsonl:1: the tokenizer's chat template does not end"
    ):
        prompts(tokenizer(template), source, chat_template=True)


def test_a_template_that_never_ends_for_a_later_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "LIMIT_S", 1.0)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0]['content'] == 'two' %}" + loop + "{% endif %}" + CHAT
    data = rows(tmp_path, {"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "2"})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the tokenizer's chat template does not end"):
        prompts(tokenizer(template), data, chat_template=True)


def test_a_token_that_the_model_lacks_is_refused_at_the_start(tmp_path: Path) -> None:
    grown = tokenizer()
    size = len(grown)
    grown.add_tokens(["<|new|>"])
    data = rows(tmp_path, {"prompt": "hi", "answer": "1"}, {"prompt": "say <|new|>", "answer": "2"})
    message = rf"rows\.jsonl:2: the prompt holds token {size} \('<\|new\|>'\), and the model has tokens 0 … {size - 1}"
    with pytest.raises(ValueError, match=message):
        prompts(grown, data, vocab_size=size)
    with pytest.raises(ValueError, match=message):
        PromptStream({"q": data}, grown, seed=0, max_prompt_tokens=64, vocab_size=size)
    assert len(prompts(grown, data, vocab_size=size + 1)) == 2  # the control: a model that has it
    template = {"prompt_template": "{prompt}<|new|>"}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the prompt holds token"):
        prompts(grown, data, vocab_size=size, **template)


def test_half_characters_in_a_template_are_refused(source: DataSourceConfig) -> None:
    with pytest.raises(ValueError, match=r"data source 'q': prompt_template='.*': \\udce9 at character 1 is half"):
        prompts(tokenizer(), source, prompt_template="\udce9{prompt}")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0]['content'] }}<|assistant|>", r"leaves out or changes the last message \('and 2\+2="),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes nothing after the last message"),
        ("{{ 'x' * 2000000 }}", "makes 2,000,000 characters of a chat of 13"),
    ],
)
def test_a_template_that_loses_the_question_is_refused(tmp_path: Path, template: str, problem: str) -> None:
    chat = [("user", "1+1="), ("assistant", "2"), ("user", "and 2+2=")]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": [{"role": role, "content": text} for role, text in chat], "answer": "4"})
    )
    given = DataSourceConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl"), verifier="math", chat_template=True)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: the tokenizer's chat template {problem}"):
        prompts(tokenizer(template), given)
