"""Files of prompts that are not what they should be: the message names file, place and remedy. References that no
answer can equal are refused where they are read."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data.records import read_records

ROW = {"prompt": "1+1=", "answer": "2"}


def read(path: Path, kind: str = "jsonl", verifier: str = "math", **settings: Any) -> list[Any]:
    """(prompt, reference) of every row."""
    records = read_records(DataSourceConfig(kind=kind, path=str(path), verifier=verifier, **settings)).records
    return [(record.prompt, record.reference) for record in records]


def jsonl(folder: Path, content: bytes | str) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(folder: Path, columns: Any) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


LINE = json.dumps(ROW) + "\n"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "jsonl", r"is empty \(0 bytes\)"),
        (b"", "parquet", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "jsonl", "git lfs pull"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "parquet", "git lfs pull"),
        (gzip.compress(LINE.encode(), mtime=0), "jsonl", "compressed by gzip. Unpack it"),
        (gzip.compress(LINE.encode(), mtime=0), "parquet", "compressed by gzip. Unpack it"),
        (bz2.compress(LINE.encode()), "jsonl", "compressed by bzip2"),
        (lzma.compress(LINE.encode()), "jsonl", "compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "jsonl", "compressed by zstd"),
        (LINE.encode("utf-16"), "jsonl", "iconv -f UTF-16"),
        (LINE.encode("utf-16-le"), "jsonl", "iconv -f UTF-16"),
        (b"<!DOCTYPE html><html></html>", "jsonl", "is a web page"),
        (LINE.encode(), "parquet", "Set kind=jsonl"),
        (b"\xef\xbb\xbf" + LINE.encode(), "parquet", "Set kind=jsonl"),
        (b"prompt,answer\n1+1=,2\n", "parquet", r"no parquet file"),
        (b"prompt,answer\n1+1=,2\n", "jsonl", r"rows\.jsonl:1 is not valid JSON.*If this is a table \(CSV\)"),
        (b"prompt\tanswer\n", "jsonl", r"If this is a table \(CSV\)"),
        (b'[\n{"prompt": "a", "answer": "1"}\n]', "jsonl", r"rows\.jsonl:1 is not valid JSON.*jq -c '\.\[\]'"),
        (b'[{"prompt": "a", "answer": "1"}]', "jsonl", r"rows\.jsonl:1 holds a JSON list.*jq -c '\.\[\]'"),
        (b'{\n"prompt": "a", "answer": "1"}', "jsonl", r"rows\.jsonl:1 is not valid JSON.*jq -c \."),
        (
            LINE.encode() + b'{"prompt":"\xe9","answer":"1"}',
            "jsonl",
            r"rows\.jsonl:2 is no UTF-8: byte 0xe9 at byte 12",
        ),
        (b'{"prompt":"a","answer":' + b"9" * 5000 + b"}", "jsonl", r"rows\.jsonl:1 holds a number that cannot be read"),
        (b'{"prompt":"a","answer":' + b"[" * 100000, "jsonl", r"rows\.jsonl:1 is nested too deeply"),
        (LINE.encode() + b'{"prompt":"a","answer":"1","answer":"2"}', "jsonl", r"rows\.jsonl:2 has 'answer' twice"),
        (
            LINE.encode() + b'{"prompt":"a\\ud800b","answer":"1"}',
            "jsonl",
            r"rows\.jsonl:2: column 'prompt' holds \\ud800",
        ),
        (b'{"prompt":"a","answer":"\\udfff"}', "jsonl", r"rows\.jsonl:1: column 'answer' holds \\udfff at character 1"),
        (b"PAR1 and nothing more", "parquet", r"damaged or cut off"),
    ],
)
def test_what_is_no_prompt_file_is_named(tmp_path: Path, content: bytes, kind: str, message: str) -> None:
    path = jsonl(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, kind)
    assert str(path) in str(caught.value)


def test_other_things_than_files(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a folder, which holds train\.parquet\. Name one file"):
        read(tmp_path, "parquet")
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    archive = tmp_path / "rows.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("rows.jsonl", LINE)
    with pytest.raises(ValueError, match=r"compressed by zip"):
        read(archive)


def test_a_parquet_file_as_jsonl_and_a_damaged_one(tmp_path: Path) -> None:
    path = table(tmp_path, {"prompt": ["a" * 50] * 50, "answer": ["1"] * 50})
    with pytest.raises(ValueError, match=r"rows\.parquet is a parquet file\. Set kind=parquet"):
        read(path)
    whole = path.read_bytes()
    assert read(path, "parquet", deduplicate=False) == [("a" * 50, "1")] * 50  # the control
    path.write_bytes(whole[:30] + bytes(30) + whole[60:])
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet: it is damaged or cut off"):
        read(path, "parquet")
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet: it is damaged or cut off"):
        read(path, "parquet")


def test_a_parquet_file_without_rows_or_with_a_column_twice(tmp_path: Path) -> None:
    empty = pa.array([], pa.string())
    with pytest.raises(ValueError, match=r"rows\.parquet holds no prompts"):
        read(table(tmp_path, {"prompt": empty, "answer": empty}), "parquet")
    names = ["prompt", "answer", "answer"]
    with pytest.raises(ValueError, match=r"rows\.parquet has 2 columns 'answer'"):
        read(table(tmp_path, pa.table([["a"], ["1"], ["2"]], names=names)), "parquet")
    others = ["prompt", "answer", "x", "x"]
    assert read(table(tmp_path, pa.table([["a"], ["1"], ["2"], ["3"]], names=others)), "parquet") == [("a", "1")]


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=["string", "large_string", "string_view", "dictionary"],
)
def test_parquet_texts_of_every_type(tmp_path: Path, kind: pa.DataType) -> None:
    prompts, answers = pa.array(["a", "b"], kind), pa.array(["1", "2"], kind)
    nested = pa.StructArray.from_arrays([answers], ["ground_truth"])
    path = table(tmp_path, {"prompt": prompts, "answer": answers, "nested": nested})
    assert read(path, "parquet") == [("a", "1"), ("b", "2")]
    assert read(path, "parquet", answer_field="nested.ground_truth") == [("a", "1"), ("b", "2")]


def test_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path) -> None:
    content = (
        "\ufeff"
        + LINE.replace("\n", "\r\n")
        + "\r\n"
        + json.dumps({"prompt": "é\u2028", "answer": 5}, ensure_ascii=False)
    )
    assert read(jsonl(tmp_path, content)) == [("1+1=", "2"), ("é\u2028", 5)]


def test_structures_that_travelled_as_json_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    row = {"prompt": json.dumps(chat), "reward_model": json.dumps({"ground_truth": "7"})}
    for schema, field in (("dapo_math", "answer"), ("columns", "reward_model.ground_truth")):
        assert read(jsonl(tmp_path, json.dumps(row)), schema=schema, answer_field=field) == [(chat, "7")]
        assert read(table(tmp_path, pa.Table.from_pylist([row])), "parquet", schema=schema, answer_field=field) == [
            (chat, "7")
        ]
    for text in ("{'ground_truth': '7'}", "7 or so", "[1]"):
        path = jsonl(tmp_path, json.dumps({"prompt": "a", "reward_model": text}))
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: column 'reward_model' holds"):
            read(path, schema="dapo_math")
    # A prompt that merely begins like JSON is a prompt.
    for text in ('{"a": 1} is what?', '[{"role": "user"}]', '{"role": "user", "content": "x"}'):
        assert read(jsonl(tmp_path, json.dumps({"prompt": text, "answer": "1"}))) == [(text, "1")]


def test_tests_given_as_json_text_are_tests(tmp_path: Path) -> None:
    """As a Python expression the list would test nothing, and every program would pass."""
    row = {"text": "Add.", "test_list": json.dumps(["assert f(1)", "assert f(2)"])}
    ((_, reference),) = read(jsonl(tmp_path, json.dumps(row)), verifier="code", schema="mbpp")
    assert reference == {"tests": "\nassert f(1)\nassert f(2)"}


# --- references ------------------------------------------------------------------------------------------------------

REFUSED = {
    "null": "is null",
    "NaN": "is nan",
    "Infinity": "is inf",
    "-Infinity": "is -inf",
    "1e999": "is inf",
    '["2", "two"]': r"holds a list of 2 .*Write the one that counts",
    "[]": "holds a list of 0",
    "[null]": "is null",
    "[NaN]": "is nan",
    '{"target": ["2"]}': r"is a struct of target, .*Name the field .*answer_field=answer\.target",
    "{}": "is a struct of nothing",
    "true": "is True, and verifier=math compares with a text or a number",
    '""': "no answer equals it",
    '"  "': "no answer equals it",
    '"####"': "no answer equals it",
    '"$$"': "no answer equals it",
    '{"tests": "assert f(1)"}': "Set verifier=code",
}


@pytest.mark.parametrize("value", REFUSED)
def test_references_that_no_answer_equals_are_refused(tmp_path: Path, value: str) -> None:
    path = jsonl(tmp_path, LINE + f'{{"prompt": "a", "answer": {value}}}')
    with pytest.raises(
        ValueError, match=rf"rows\.jsonl:2: column 'answer' {REFUSED[value]}|{REFUSED[value]}"
    ) as caught:
        read(path)
    assert f"{path}:2: column 'answer'" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reference"),
    [
        ("2", 2),
        ("2.5", 2.5),
        ('"x"', "x"),
        ('["2"]', "2"),
        ("[2]", 2),
        ('[["2"]]', "2"),
        ('"\\\\emptyset"', "\\emptyset"),
        ('"{}"', "{}"),
        ('"\u221e"', "∞"),
        ("12345678901234567890123456789", 12345678901234567890123456789),
    ],
)
def test_references_that_can_be_equalled_are_taken(tmp_path: Path, value: str, reference: Any) -> None:
    assert read(jsonl(tmp_path, f'{{"prompt": "a", "answer": {value}}}')) == [("a", reference)]


def test_rules_differ_by_verifier(tmp_path: Path) -> None:
    structure = jsonl(tmp_path, '{"prompt": "a", "answer": {"target": [1, 2]}}')
    for own in ("judges:verify", "http://host:1/score"):
        assert read(structure, verifier=own) == [("a", {"target": [1, 2]})]
    with pytest.raises(ValueError, match="is a struct of target"):
        read(structure, verifier="exact")
    nothing = jsonl(tmp_path, '{"prompt": "a", "answer": NaN}')
    for any_verifier in ("judges:verify", "exact", "code", "http://host:1/score"):
        with pytest.raises(ValueError, match=r"rows\.jsonl:1"):
            read(nothing, verifier=any_verifier)
    assert read(jsonl(tmp_path, '{"prompt": "a", "answer": ""}'), verifier="exact") == [("a", "")]
    for broken in ('"not JSON"', '{"inputs": ["1"], "outputs": []}', "5", '{"tests": ""}'):
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: column 'answer': .*a code reference"):
            read(jsonl(tmp_path, f'{{"prompt": "a", "answer": {broken}}}'), verifier="code")
    sound = {"inputs": ["1"], "outputs": ["2"]}
    assert read(jsonl(tmp_path, json.dumps({"prompt": "a", "answer": sound})), verifier="code") == [("a", sound)]


def test_references_of_parquet_types(tmp_path: Path) -> None:
    for values in ([float("nan")], [None], [b"2"], [True]):
        with pytest.raises(ValueError, match=r"rows\.parquet, row 0: column 'answer'"):
            read(table(tmp_path, {"prompt": ["a"], "answer": values}), "parquet")
    day = datetime.date(2026, 11, 25)
    for value in (2, 2.5, "2", decimal.Decimal("2.50"), day):
        assert read(table(tmp_path, {"prompt": ["a"], "answer": [value]}), "parquet") == [("a", value)]


def test_a_list_that_travelled_as_json_text_counts_as_what_is_in_it(tmp_path: Path) -> None:
    def given(reference: str, verifier: str = "math") -> Any:
        return read(jsonl(tmp_path, json.dumps({"prompt": "x", "answer": reference})), verifier=verifier)[0][1]

    assert given('["34"]') == "34"
    assert given('["\\\\frac{1}{2}"]') == "\\frac{1}{2}"
    assert given("[1, 2]") == "[1, 2]"  # an interval
    assert given('["34"]', "exact") == '["34"]'
    with pytest.raises(ValueError, match="holds a list of 2"):
        given('["34", "35"]')
    for missing in ("nan", "NaN", "<NA>"):
        with pytest.raises(ValueError, match="a number that is missing"):
            given(missing)
        assert given(missing, "exact") == missing


def test_messages_as_pythons_text_are_refused(tmp_path: Path) -> None:
    row = {"prompt": str([{"role": "user", "content": "1+1="}]), "answer": "2"}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .* holds Python's text of chat messages"):
        read(jsonl(tmp_path, json.dumps(row)))


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(ValueError, match=r"loop\.jsonl"):
        read(tmp_path / "loop.jsonl")
