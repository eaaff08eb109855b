"""Text in configurations: kept as it is written, or refused with what to do."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from megatron_fipo.config import Config, ConfigError, load_config, resolved_yaml
from megatron_fipo.config.yaml_values import MAX_LEVELS

TEXT_KEYS = {
    "run.name": lambda c: c.run.name,
    "run.output_dir": lambda c: c.run.output_dir,
    "model.path": lambda c: c.model.path,
    "servers.python": lambda c: c.servers.python,
    "metrics.wandb_project": lambda c: c.metrics.wandb_project,
    "data.train.a.path": lambda c: c.data.train["a"].path,
    "data.train.a.prompt_template": lambda c: c.data.train["a"].prompt_template,
    "data.train.a.system_prompt": lambda c: c.data.train["a"].system_prompt,
    "data.evaluation.a.answer_field": lambda c: c.data.evaluation["a"].answer_field,
}
VERBATIM = [
    "Question {prompt} End with #### and the number",
    "/data/set #2/train.jsonl",
    "#### {prompt}",
    "{prompt}",
    '{"question": {prompt}}',
    "[1]",
    "a: b",
    "- {prompt}",
    "*{prompt}*",
    "&{prompt}",
    "%s @x `y` | z > w ! v",
    "'{prompt}' and 'that'",
    "1.10",
    "1e3",
    "true",
    "off",
    "1_000",
    "007",
    "0x10",
    "2026-11-25",
    "12:30:00",
    ".inf",
    "-",
    "?",
    " with spaces ",
    "\\boxed{}",
]


def read_back(config: Config) -> Config:
    """The configuration that the file beside the run gives."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(resolved_yaml(config))
        return load_config(path)


@pytest.mark.parametrize("text", VERBATIM)
def test_the_value_of_an_override_is_its_text(text: str) -> None:
    config = load_config(None, [f"{key}={text}" for key in TEXT_KEYS])
    assert {key: read(config) for key, read in TEXT_KEYS.items()} == dict.fromkeys(TEXT_KEYS, text)
    assert read_back(config) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'1.10'", "1.10"),
        ('"a # b"', "a # b"),
        ('"line\\n"', "line\n"),
        ("'it''s'", "it's"),
        ("", ""),
        ("'null'", "null"),
    ],
)
def test_quotes_around_the_whole_of_an_override_are_not_part_of_it(text: str, expected: str) -> None:
    assert load_config(None, [f"data.train.a.system_prompt={text}"]).data.train["a"].system_prompt == expected


def test_null_is_null_where_a_key_may_be_null_and_refused_where_it_may_not() -> None:
    assert load_config(None, ["servers.python=null"]).servers.python is None
    assert load_config(None, ["servers.python='null'"]).servers.python == "null"
    for word in ("null", "~", "NULL"):
        with pytest.raises(ConfigError, match=r"null is no text\. Write '.*' in quotes if that word is meant"):
            load_config(None, [f"data.train.a.system_prompt={word}"])


@pytest.mark.parametrize("text", ["1.10", "1e3", "true", "off", "1_000", "007", "0x10", "2026-11-25", "12:30:00"])
def test_a_file_keeps_text_as_it_is_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{name: {text}}}\nmodel:\n  path: {text} # a comment\ndata: {{train: {{{text.replace(':', '-')}: "
        f"{{path: {text}}}}}}}\nservers: {{extra_args: [--x, {text}], python: &p {text}}}\n"
    )
    config = load_config(path)
    assert (config.run.name, config.model.path) == (text, text)
    assert config.servers.extra_args == ["--x", text]
    (source,) = config.data.train.items()
    assert source[0] == text.replace(":", "-")
    assert source[1].path == text
    assert read_back(config) == config


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        (
            "run: {name: 5}\nmodel:\n  path: /data/set #2/model",
            "line 3: '#2/model' after '/data/set' would be left out",
        ),
        (
            "data: {train: {a: {\n  prompt_template: 'x {prompt}', system_prompt: Use #### it\n}}}",
            "'#### it' after 'Use' would be left out as a comment. Put the text into quotes",
        ),
        ("data:\n  train:\n    a:\n      prompt_template: {prompt}\n", "text was expected. Put it into quotes."),
        ("run: {name: null}", "run.name=null in"),
        ("run: {name: [a]}", "text was expected. Put it into quotes."),
        ("servers: {gpus: 0}", "servers.gpus=0 in"),
        ("run: {name: a: b}", "is not valid YAML"),
        ("run: {name: a: b}", "Put text that holds any of : # { } [ ]"),
        ("run: {name: !!python/object:os.system x}", "could not determine a constructor for the tag"),
        ("run: !!set {name}", "the tag tag:yaml.org,2002:set has no meaning"),
    ],
)
def test_what_a_file_would_change_without_a_word_is_refused(tmp_path: Path, line: str, fragment: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_comment_is_still_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  name: mine # that is all\n  output_dir: out #\ntrain: {num_steps: 3} #three\n")
    config = load_config(path)
    assert (config.run.name, config.run.output_dir, config.train.num_steps) == ("mine", "out", 3)


@pytest.mark.parametrize(
    "override",
    [
        "train.num_steps=5 #6",
        "servers.gpus=[0] #1",
        "data.train.a.params={a: 1} #x",
        "data.train.a.params=#x",
        "data.train.a.params={a: b #c}",
        "servers.extra_args=[--a, b #c]",
        "data.train.a.params=a: 5 #x",
    ],
)
def test_an_override_has_no_comments(override: str) -> None:
    with pytest.raises(ConfigError, match="into quotes"):
        load_config(None, [override])


def test_parameters_are_yaml() -> None:
    config = load_config(None, ["data.train.a.params={a: 1, b: 1e-3, c: [x, 'y #z'], 5: true}"])
    assert config.data.train["a"].params == {"a": 1, "b": 1e-3, "c": ["x", "y #z"], "5": True}


BOMB = "data:\n  train:\n    a:\n      params:\n        a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"        a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        (BOMB, "more than 100,000 values"),
        ("data: &p {train: *p}", "an alias (*name) refers to what it lies in"),
        ("data: {train: {a: {params: &p [*p]}}}", "an alias (*name) refers to what it lies in"),
        (f"run: {'[' * 3000}{']' * 3000}", f"deeper than {MAX_LEVELS} levels"),
        (f"run: {'{a: ' * 3000}1{'}' * 3000}", f"deeper than {MAX_LEVELS} levels"),
        ("? [1]\n: 2\n", "line 1: a key is a word"),
        ("? {a: 1}\n: 2\n", "line 1: a key is a word"),
        ("train: {? [1] : 2}", "line 1: a key is a word"),
        (f"train: {{num_steps: {'9' * 5000}}}", "cannot be read: Exceeds the limit"),
        ("run: {name: 'a\x07b'}", "is not valid YAML"),
    ],
    ids=[
        "bomb",
        "itself",
        "itself in a list",
        "lists",
        "mappings",
        "list key",
        "mapping key",
        "inner",
        "digits",
        "bell",
    ],
)
def test_hostile_yaml_ends_in_words(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_aliases_are_good_for_what_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  train:\n    a: &a {kind: jsonl, path: 1.10}\n    b: *a\n")
    config = load_config(path)
    assert config.data.train["a"] == config.data.train["b"]
    assert config.data.train["b"].path == "1.10"


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        ("run: {name: é}\n".encode("latin-1"), "line 1: byte 0xe9 is no UTF-8"),
        ("# x\nrun: {name: é}\n".encode("latin-1"), "line 2: byte 0xe9"),
        ("run: {name: a}\n".encode("utf-16"), "is encoded in UTF-16"),
    ],
)
def test_other_encodings_are_named_with_the_file(tmp_path: Path, raw: bytes, fragment: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)
    assert "iconv" in str(caught.value)


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeffrun: {name: a}\n".encode())
    assert load_config(path).run.name == "a"


@pytest.mark.parametrize("override", ["run.name=???", "run.name='???'", "train.num_steps=???", "model.path=???"])
def test_a_value_that_is_still_to_be_given_is_no_default(override: str) -> None:
    with pytest.raises(ConfigError, match=r"\?\?\? stands for a value that is still to be given"):
        load_config(None, [override])


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('run:\n  name: "a\\ud800"\n')
    with pytest.raises(ConfigError, match=r"run\.yaml, line 2: \\ud800 at character 2 is half of a character"):
        load_config(tmp_path / "run.yaml")


def test_only_0_and_1_are_truth_values_among_numbers() -> None:
    assert [load_config(None, [f"train.resume={value}"]).train.resume for value in (0, 1)] == [False, True]
    with pytest.raises(ConfigError, match=r"train\.resume=2': 2 is neither true nor false"):
        load_config(None, ["train.resume=2"])


def test_blanks_around_the_equals_sign_belong_to_neither_side() -> None:
    assert load_config(None, ["run.name = a b"]).run.name == "a b"
    assert load_config(None, ["run.name= a b"]).run.name == " a b"  # as it stands behind the sign


def test_nothing_in_braces_takes_sources_and_parameters_away(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "data: {train: {a: {kind: chain_arithmetic, params: {num_terms: 3}}}, evaluation: {b: {kind: jsonl}}}"
    )
    config = load_config(tmp_path / "run.yaml", ["data.evaluation={}", "data.train.a.params={}"])
    assert (config.data.evaluation, config.data.train["a"].params) == ({}, {})
    assert load_config(tmp_path / "run.yaml", ["run={}"]).data.evaluation.keys() == {"b"}


def test_a_merge_key_draws_a_section_in_and_what_stands_beside_it_counts(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "data:\n"
        "  train: {a: &a {kind: jsonl, path: 1.10, weight: 2}, b: &b {kind: parquet, split: x}}\n"
        "  evaluation: {c: {<<: *a, path: held_out}, d: {path: d, <<: [*b, *a]}}\n"
    )
    held_out = load_config(tmp_path / "run.yaml").data.evaluation
    assert [(s.kind, s.path, s.split, s.weight) for s in held_out.values()] == [
        ("jsonl", "held_out", "", 2),
        ("parquet", "d", "x", 2),
    ]
    (tmp_path / "run.yaml").write_text("run: {<<: 3}")
    with pytest.raises(ConfigError, match=r"line 1: << takes a section"):
        load_config(tmp_path / "run.yaml")
