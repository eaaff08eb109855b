"""Traces: which groups are chosen, the texts of single tokens, why tokens are left out, and the files."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fipo.config import Config, RewardSection
from megatron_fipo.parallel.traced_tokens import TracedTokens
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.run.trace_choice import choose_groups
from megatron_fipo.run.tracing import _reason_of_all, _reasons
from megatron_fipo.system.disk import DiskError
from megatron_fipo.traces.files import forget_traces, path_of, read_trace, trace_files, write_trace
from megatron_fipo.traces.schema import REASONS, TracedResponse, columns
from megatron_fipo.traces.texts import _told_apart, token_texts_with


def traced(num_tokens: int, **changes: Any) -> TracedResponse:
    """A response of n tokens with numbers that differ from one another."""
    numbers = np.arange(num_tokens, dtype=np.float32)
    floats = {name: numbers * 1.5 + place for place, name in enumerate(FLOATS)}
    whole = dict.fromkeys(("source", "prompt", "response", "reference", "answer", "error", "left_out"), "")
    given: dict[str, Any] = {
        **whole,
        **floats,
        **{"step": 4, "update": 2, "num_updates": 8, "prompt_id": 7, "sample_index": 1, "created_at_step": 3},
        **{"score": 1.0, "reward": 1.0, "advantage": 0.5, "finish_reason": "stop", "prompt": "1+1="},
        "token_ids": np.arange(num_tokens, dtype=np.int32),
        "texts": [f"{token}é\n" for token in range(num_tokens)],
        "segments": np.zeros(num_tokens, np.int16),
        "policy_versions": np.full(num_tokens, 3, np.int32),
        "participates": numbers % 2 == 0,
        "left_out_tokens": ["" if token % 3 else "too_stale" for token in range(num_tokens)],
    }
    return TracedResponse(**(given | changes))


FLOATS = (
    *("rollout_log_probs", "old_log_probs", "log_probs", "log_prob_shifts", "future_kl", "influence_weights"),
    *("token_losses", "correction_weights", "entropies"),
)


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = [
        traced(5),
        traced(0, sample_index=2),
        traced(3, sample_index=3, future_kl=np.full(3, np.nan, np.float32)),
    ]
    path = write_trace(tmp_path / "traces", written, {"half_life_tokens": 32.0, "dual_clip": None})
    found = read_trace(path)
    assert found.objective == {"half_life_tokens": 32.0, "dual_clip": None}
    assert list(trace_files(tmp_path / "traces")) == [(4, 2)]
    for one, other in zip(found.responses, written, strict=True):
        for name, _, _ in columns():
            left, right = getattr(one, name), getattr(other, name)
            if isinstance(right, np.ndarray):
                assert left.dtype == right.dtype, name
                assert left.tobytes() == right.tobytes(), name
            else:
                assert left == right, name


def test_each_column_says_what_it_means(tmp_path: Path) -> None:
    path = write_trace(tmp_path, [traced(2)], {})
    described = {field.name: field.metadata[b"description"].decode() for field in pq.read_schema(path)}
    assert described == {name: meaning for name, _, meaning in columns()}


KINDS = {pa.string(): "text", pa.bool_(): "yes or no", pa.float32(): "number", pa.float64(): "number"}


def test_the_documentation_has_each_column() -> None:
    text = (Path(__file__).parents[2] / "docs/traces.md").read_text(encoding="utf-8")
    for name, kind, meaning in columns():
        item = kind.value_type if pa.types.is_list(kind) else kind
        holds = ("list, " if item is not kind else "") + KINDS.get(item, "whole number")
        assert f"\n| `{name}` | {holds} | {meaning} |\n" in text
    assert all(f"\n| `{reason}` | " in text for reason in REASONS if reason)


def test_the_same_trace_has_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write_trace(tmp_path / name, [traced(5)], {"a": 1}).read_bytes() for name in ("one", "other"))
    assert one == other


def test_only_updates_that_come_again_are_forgotten(tmp_path: Path) -> None:
    for step, update in ((0, 0), (3, 1), (3, 2), (4, 0)):
        write_trace(tmp_path, [traced(1, step=step, update=update)], {})
    (tmp_path / "step_000003_update_004.parquet.partial").write_bytes(b"torn")
    forget_traces(tmp_path, 3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        path_of(tmp_path, 0, 0).name,
        path_of(tmp_path, 3, 1).name,
    ]


def _with_metadata(name: str, value: str) -> Callable[[pa.Table], pa.Table]:
    changes = {f"megatron_fipo.{name}".encode(): value.encode()}
    return lambda table: table.replace_schema_metadata({**table.schema.metadata, **changes})


def _with_future_kl(values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.schema.get_field_index("future_kl"), "future_kl", values)


def test_a_damaged_or_later_file_is_refused(tmp_path: Path) -> None:
    path = path_of(tmp_path, 1, 0)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"update_000.parquet is no trace, or is damaged: .*Delete it"):
        read_trace(path)
    write_trace(tmp_path, [traced(1, step=1, update=0)], {})
    table = pq.read_table(path)
    later = {**table.schema.metadata, b"megatron_fipo.trace_format": b"99"}
    pq.write_table(table.replace_schema_metadata(later), path)
    with pytest.raises(
        ValueError, match="is a trace of format 99; this version of megatron_fipo reads formats up to 1"
    ):
        read_trace(path)
    pq.write_table(table.drop_columns(["future_kl"]), path)
    with pytest.raises(ValueError, match="is no trace, or is damaged"):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda table: table.replace_schema_metadata({}), "its metadata have no megatron_fipo.trace_format"),
        (_with_metadata("trace_format", "one"), "its metadata have no megatron_fipo.trace_format"),
        (_with_metadata("objective", "{"), "its metadata have no megatron_fipo.trace_format"),
        (_with_future_kl(pa.array([1.0])), "its column future_kl holds double"),
        (_with_future_kl(pa.array([None], pa.list_(pa.float32()))), "or nothing somewhere, and not list"),
        (_with_future_kl(pa.array([[1.0]], pa.list_(pa.float32()))), "of 3 tokens has 1 entries in future_kl"),
        (lambda table: table.drop_columns(["future_kl"]), "it has no column future_kl"),
    ],
)
def test_what_is_no_trace_is_told(change: Callable[[pa.Table], pa.Table], expected: str, tmp_path: Path) -> None:
    path = write_trace(tmp_path, [traced(3)], {})
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(ValueError, match=rf"update_002.parquet is no trace, or is damaged: .*{expected}.*Delete it"):
        read_trace(path)


def test_a_file_that_cannot_be_read_is_not_to_be_deleted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.parquet cannot be read: No such file or directory\. Mend that"):
        read_trace(tmp_path / "x.parquet")


def test_lone_surrogates_do_not_end_a_run(tmp_path: Path) -> None:
    """JSON has them, so data, answers and errors may."""
    (found,) = read_trace(write_trace(tmp_path, [traced(2, reference="a\ud800", texts=["é", "\udfff"])], {})).responses
    assert (found.reference, found.texts) == ("a\\ud800", ["é", "\\udfff"])


def test_a_trace_without_room_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    with pytest.raises(DiskError, match=r"step_000004_update_002\.parquet cannot be written"):
        write_trace(tmp_path / "traces", [traced(2)], {})


def test_an_unfinished_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_trace(tmp_path, [traced(2)], {})
    before = path.read_bytes()

    def full(table: pa.Table, place: Path, **settings: Any) -> None:
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DiskError, match="No space left on device"):
        write_trace(tmp_path, [traced(3)], {})
    assert path.read_bytes() == before
    assert list(trace_files(tmp_path).values()) == [path], "what is not finished is no trace"


def test_a_trace_that_cannot_be_forgotten_is_a_disk_error(tmp_path: Path) -> None:
    path_of(tmp_path, 4, 0).mkdir()
    with pytest.raises(DiskError):
        forget_traces(tmp_path, 4)


# --- choice ----------------------------------------------------------------------------------------------------------


def judged(prompt_id: int, scores: str, num_tokens: int = 2) -> JudgedGroup:
    """One response a letter of `scores`: r is right, w is wrong."""
    samples = [
        Trajectory.of_response(
            prompt_id=prompt_id,
            sample_index=index,
            prompt_ids=torch.tensor([1]),
            response_ids=torch.zeros(num_tokens, dtype=torch.int64),
            rollout_log_probs=torch.zeros(num_tokens),
            finish_reason="stop",
            accuracy=float(letter == "r"),
        )
        for index, letter in enumerate(scores)
    ]
    return JudgedGroup.of(Group(Prompt(prompt_id, "sums", "", (1,), "exact", ""), samples))


def choose(groups: list[JudgedGroup], first: int = 0, count: int = 2, most: int = 1000, step: int = 0) -> list[int]:
    return choose_groups(groups, first, count, most, seed=5, step=step)


def test_mixed_groups_come_first() -> None:
    groups = [judged(0, "rr"), judged(1, "rw"), judged(2, "ww"), judged(3, "wr"), judged(4, "rr")]
    for step in range(20):
        assert choose(groups, step=step) == [1, 3]
        assert {1, 3} < set(choose(groups, count=3, step=step))


def test_groups_of_later_minibatches_come_before_those_of_the_first() -> None:
    groups = [judged(place, "rw") for place in range(6)]
    found = {tuple(choose(groups, first=4, step=step)) for step in range(20)}
    assert found == {(4, 5)}
    assert choose([*groups[:4], judged(4, "rr"), judged(5, "rr")], first=4, count=1)[0] < 4, "mixed ones first"


def test_the_seed_and_the_step_decide_among_equals() -> None:
    groups = [judged(place, "rw") for place in range(30)]
    assert choose(groups, step=1) == choose(groups, step=1)
    assert len({tuple(choose(groups, step=step)) for step in range(20)}) > 10
    assert choose_groups(groups, 0, 2, 1000, seed=6, step=1) != choose(groups, step=1)


def test_no_more_tokens_than_allowed() -> None:
    groups = [judged(0, "rw", 10), judged(1, "rw", 10), judged(2, "rw", 3), judged(3, "rw", 100)]
    for step in range(20):
        chosen = choose(groups, count=4, most=30, step=step)
        tokens = [int(groups[place].rows["num_tokens"].sum()) for place in chosen]
        assert sum(tokens) <= 30 or len(tokens) == 1
        assert chosen
    assert choose([judged(0, "rw", 100)], most=30) == [0], "the first is chosen whatever it has"


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte, and a few for more."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "th", "Ġt"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_character_is_the_last_of_its_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    texts = token_texts_with(byte_level)(byte_level.encode("a the 数é"))
    assert texts == ["a", " t", "h", "e", " ", "", "", "数", "", "é"]


@given(text=st.text(), token_ids=st.lists(st.integers(0, 257), max_size=40))
def test_texts_join_to_the_whole(byte_level: PreTrainedTokenizerFast, text: str, token_ids: list[int]) -> None:
    """Of a real text, and of tokens that are no text."""
    texts = token_texts_with(byte_level)
    encodable = text.encode("utf-8", "replace").decode()
    for ids in (byte_level.encode(encodable), token_ids):
        whole = byte_level.backend_tokenizer.decode(ids, skip_special_tokens=False)
        for found in (
            texts(ids),
            _told_apart(ids, partial(byte_level.backend_tokenizer.decode, skip_special_tokens=False)),
        ):
            assert len(found) == len(ids)
            assert "".join(found) == whole


def test_spaces_stay_where_a_decoder_leaves_out_the_first() -> None:
    tokenizer = Tokenizer(models.BPE({"▁a": 0, "b": 1}, []))
    tokenizer.decoder = decoders.Metaspace()
    assert _told_apart([0, 0, 1, 0, 0], tokenizer.decode) == ["a", " a", "b", " a", " a"]


@pytest.fixture(scope="module")
def with_bytes() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: bytes are tokens, and one that belongs to no character spoils its neighbours."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "▁a": 258, "b": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(token_ids=st.lists(st.integers(0, 259), max_size=40))
def test_bytes_that_are_no_characters_do_not_end_a_run(
    with_bytes: PreTrainedTokenizerFast, token_ids: list[int]
) -> None:
    found = token_texts_with(with_bytes)(token_ids)
    assert len(found) == len(token_ids)
    assert "".join(found).replace("\ufffd", "").count("b") >= token_ids.count(259)


def test_characters_of_bytes_join(with_bytes: PreTrainedTokenizerFast) -> None:
    ids = [258, *(byte + 1 for byte in "数é".encode()), 259, 257, 258]
    assert token_texts_with(with_bytes)(ids) == [" a", "", "", "数", "", "é", "b", " ", " a"]
    broken = token_texts_with(with_bytes)([258, 0xFF + 1, *[0xC3 + 1] * 9, 259, 258])
    assert ("".join(broken), broken[-1]) == (" a" + "\ufffd" * 10 + "b a", " a")


def test_the_time_of_a_long_response_of_broken_bytes_grows_with_its_length(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    """Decoded tokens, not seconds: whatever the length, a few of them at a time."""
    most = 0

    def decode(ids: list[int]) -> str:
        nonlocal most
        most = max(most, len(ids))
        return str(byte_level.backend_tokenizer.decode(ids, skip_special_tokens=False))

    (half,) = byte_level.convert_tokens_to_ids(["Ã"])  # the first of two bytes
    assert "".join(_told_apart([half] * 500, decode)) == "\ufffd" * 500
    assert most <= 8


# --- reasons ---------------------------------------------------------------------------------------------------------


def tokens_of(response_mask: str, final_mask: str, *, passes_filter: bool = True) -> TracedTokens:
    """One letter for each token: y is yes."""
    masks = [np.array([letter == "y" for letter in mask]) for mask in (response_mask, final_mask)]
    zeros = np.zeros(len(response_mask), np.float32)
    floats: dict[str, Any] = dict.fromkeys(FLOATS[1:], zeros)  # the first one is told by the trajectory
    return TracedTokens(
        positions=np.arange(len(zeros), dtype=np.int32),
        participates=masks[0],
        response_mask=masks[0],
        final_mask=masks[1],
        passes_filter=np.full(len(zeros), passes_filter),
        **floats,
    )


def trajectory(finish_reason: str = "stop") -> Trajectory:
    """Two tokens of the policy's, one of an environment's, one of the policy's."""
    own = [Segment(torch.zeros(n, dtype=torch.int64), "policy", torch.zeros(n), 1) for n in (2, 1)]
    between = Segment(torch.zeros(1, dtype=torch.int64), "environment")
    return Trajectory(SampleKey("s", 0, 0), torch.tensor([1]), [own[0], between, own[1]], finish_reason)


MASKS_TRUNCATED = replace(Config(), reward=RewardSection(mask_truncated=True))


@pytest.mark.parametrize(
    ("expected", "tokens", "finish_reason", "config"),
    [
        (["", "", "environment", ""], tokens_of("yyny", "yyny"), "stop", Config()),
        (["too_stale", "", "environment", ""], tokens_of("nyny", "nyny"), "stop", Config()),
        (["rollout_correction", "", "environment", ""], tokens_of("yyny", "nyny"), "stop", Config()),
        (
            ["sequence_filter", "sequence_filter", "environment", "sequence_filter"],
            tokens_of("yyny", "nnnn", passes_filter=False),
            *("stop", Config()),
        ),
        (["truncated", "truncated", "environment", "truncated"], tokens_of("nnnn", "nnnn"), "length", MASKS_TRUNCATED),
        (["", "", "environment", ""], tokens_of("yyny", "yyny"), "length", Config()),
    ],
)
def test_why_a_token_is_left_out(expected: list[str], tokens: TracedTokens, finish_reason: str, config: Config) -> None:
    found = _reasons(trajectory(finish_reason), tokens, config)
    assert found == expected
    assert set(found) <= set(REASONS)


def test_why_a_whole_response_is_left_out() -> None:
    assert _reason_of_all([]) == ""
    assert _reason_of_all(["too_stale", "", "too_stale"]) == ""
    assert _reason_of_all(["too_stale", "sequence_filter", "sequence_filter"]) == "sequence_filter"
    assert _reason_of_all(["truncated"] * 2) == "truncated"
