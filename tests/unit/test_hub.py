"""Names on the hub: the real client of huggingface_hub against a stand-in of the hub on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants as constants
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from megatron_fipo.cli import main
from megatron_fipo.config import Config, DataSourceConfig, is_hub_name, load_config, recorded_values, save_resolved
from megatron_fipo.convert.offline.run_checkpoint import find_checkpoint
from megatron_fipo.data.records import read_records
from megatron_fipo.evaluation.chat import ChatOptions, talk
from megatron_fipo.hub import client
from megatron_fipo.hub.client import NoAccessError, UnreachableError
from megatron_fipo.hub.datasets import choose_files, fetched_here
from megatron_fipo.hub.models import cached_model, fetch_model, model_commit, model_folder
from megatron_fipo.hub.names import HubError, Repository
from megatron_fipo.hub.pushing import check_may_push, model_card, push, upload_command
from megatron_fipo.metrics.provenance import save_provenance
from megatron_fipo.run import named_on_hub
from megatron_fipo.system.disk import DiskError
from megatron_fipo.system.error_net import EXIT_STOPPED
from tests.hub_stand_in import StandInHub, serve

pytestmark = pytest.mark.slow

BASE = Path(__file__).parents[2] / "examples/quickstart/base"
MODEL = {file.name: file.read_bytes() for file in BASE.iterdir()}
NAME = "Qwen/Tiny"
CARD = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
dataset_info:
- config_name: main
  splits:
  - name: train
    num_examples: 5
---
# Sums
"""


def repository(name: str = NAME, revision: str | None = None) -> Repository:
    return Repository("model.path", name, revision=revision)


def table(*prompts: str) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([{"prompt": prompt, "answer": prompt[::-1]} for prompt in prompts]), file)
    return file.getvalue()


SUMS = {
    "README.md": CARD,
    "main/train-00000-of-00002.parquet": table("a1", "a2", "a3"),
    "main/train-00001-of-00002.parquet": table("a2", "b1"),
    "main/test-00000-of-00001.parquet": table("c1"),
    "socratic/train-00000-of-00001.parquet": table("d1"),
}


def source(**values: Any) -> DataSourceConfig:
    return replace(DataSourceConfig(kind="hub", path="openai/sums", subset="main", split="train"), **values)


def prompts(given: DataSourceConfig) -> list[str]:
    return [str(record.prompt) for record in read_records(given).records]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    with serve(StandInHub()) as stand_in:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # which holds for the other tests
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.endpoint)
        template = stand_in.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(client, "RETRY_WAITS_S", (0.0, 0.0))
        yield stand_in
        huggingface_hub.close_session()  # the client keeps its connections


def log_in(hub: StandInHub, monkeypatch: pytest.MonkeyPatch, **account: Any) -> None:
    hub.accounts["a-token"] = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}, **account}
    monkeypatch.setenv("HF_TOKEN", "a-token")


@pytest.mark.parametrize("path", ["/api/models", "/resolve/", "/cdn/"])
def test_a_hub_that_cannot_serve_just_now_is_asked_again(hub: StandInHub, path: str) -> None:
    hub.repository(NAME).commit(MODEL)
    hub.fails = {path: [503, 429]}
    assert (Path(model_folder(NAME)) / "config.json").is_file()
    assert hub.fails == {path: []}


def test_a_hub_that_goes_on_failing_is_given_up(hub: StandInHub) -> None:
    hub.repository(NAME).commit(MODEL)
    hub.fails = {"/api/models": [503, 503, 503, 418]}
    with pytest.raises(UnreachableError, match="answers 503"):
        model_folder(NAME)
    assert hub.fails == {"/api/models": [418]}  # twice again, and no more


def test_a_hub_that_falls_silent_is_given_up(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing of files has no time limit of the client's own."""
    hub.repository(NAME).commit(MODEL)
    monkeypatch.setattr(client, "LONGEST_SILENCE_S", 0.2)
    monkeypatch.setattr(huggingface_hub.utils._pagination, "http_backoff", once)
    hub.silent = "/tree/"
    with pytest.raises(UnreachableError, match="cannot be reached: ReadTimeout"):
        model_folder(NAME)
    assert any("/tree/" in line for line in hub.requests)


def once(*arguments: Any, **settings: Any) -> Any:
    """The client's request without its waits between five more tries."""
    return huggingface_hub.utils.http_backoff(*arguments, **{**settings, "max_retries": 0})


def test_a_password_in_the_endpoint_is_not_repeated(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//me:pa55word@"))
    hub.down = 503
    with pytest.raises(UnreachableError) as caught:
        model_folder(NAME)
    assert hub.endpoint in str(caught.value)
    assert "pa55word" not in str(caught.value)


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_folder_goes_before_the_hub_and_a_typing_error_in_a_path_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen2.5-0.5B")
    for path in ("base", "./Qwen/x", "a/b/c", "/Qwen/x", "~/x", "Qwen/..", "Qwen/a--b", "", "Qwen/"):
        assert not is_hub_name(path), path
    (tmp_path / "outputs").mkdir()
    assert not is_hub_name("outputs/typo")
    (tmp_path / "Qwen/Qwen2.5-0.5B").mkdir(parents=True)
    assert not is_hub_name("Qwen/Qwen2.5-0.5B")


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_fetched_once_without_code_or_pickles(hub: StandInHub) -> None:
    more = {
        "pytorch_model.bin": b"p",
        "modeling.py": b"c",
        "onnx/model.safetensors": b"o",
        "consolidated.safetensors": b"2",
    }
    commit = hub.repository(NAME).commit({**MODEL, **more})
    found, note = model_commit(repository())
    folder = fetch_model(repository(), found)
    assert (found, note) == (commit, "")
    assert folder.name == commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MODEL
    fetched = len(hub.downloads())
    assert fetched == len(MODEL)
    assert fetch_model(repository(), commit) == folder
    assert len(hub.downloads()) == fetched


def test_a_revision_is_a_branch_or_a_commit(hub: StandInHub) -> None:
    first = hub.repository(NAME).commit(MODEL)
    second = hub.repository(NAME).commit({**MODEL, "LICENSE": b"free"}, "v2")
    assert model_commit(repository())[0] == first
    assert model_commit(repository(revision="v2"))[0] == second
    assert Path(model_folder(NAME, second), "LICENSE").read_bytes() == b"free"
    with pytest.raises(HubError, match=r"model.path=Qwen/Tiny: the model has no revision 'v3'") as refusal:
        model_commit(repository(revision="v3"))
    assert not isinstance(refusal.value, (UnreachableError, NoAccessError))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_wrong_bytes_of_the_right_number_are_noticed_and_fetched_anew(hub: StandInHub, file: str) -> None:
    hub.repository(NAME).commit(MODEL)
    hub.spoilt.add(file)
    with pytest.raises(HubError, match=r"does not match the hub's checksum .* was deleted"):
        model_folder(NAME)
    hub.spoilt.clear()
    assert Path(model_folder(NAME), file).read_bytes() == MODEL[file]


def test_a_file_that_ends_early_is_noticed_and_fetched_anew(hub: StandInHub) -> None:
    hub.repository(NAME).commit(MODEL)
    hub.cut.add("model.safetensors")
    with pytest.raises(HubError, match=r"model.path=Qwen/Tiny"):
        model_folder(NAME)
    assert cached_model(repository()) is None
    hub.cut.clear()
    assert Path(model_folder(NAME), "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_weights_that_are_no_safetensors_are_refused(hub: StandInHub) -> None:
    pickled = {name: content for name, content in MODEL.items() if not name.endswith(".safetensors")}
    hub.repository(NAME).commit({**pickled, "pytorch_model.bin": b"pickle"})
    with pytest.raises(HubError, match="no weights in safetensors at commit"):
        model_folder(NAME)


def test_where_the_hub_does_not_answer_a_whole_model_in_the_cache_stands_in(hub: StandInHub) -> None:
    commit = hub.repository(NAME).commit(MODEL)
    hub.down = 503
    with pytest.raises(UnreachableError) as refusal:
        model_folder(NAME)
    message = str(refusal.value)
    assert "it answers 503" in message
    assert "\n    hf download Qwen/Tiny\n" in message
    assert str(Path.cwd() / NAME) in message  # where a folder was looked for
    assert constants.HF_HUB_CACHE in message
    hub.down = 0
    folder = Path(model_folder(NAME))
    hub.down = 503
    assert model_commit(repository()) == (
        commit,
        f"model.path=Qwen/Tiny: the hub cannot be reached; taken from its cache, at commit {commit}",
    )
    assert model_folder(NAME) == str(folder)
    (folder / "model.safetensors").unlink()  # and a part of one does not
    with pytest.raises(UnreachableError):
        model_folder(NAME)


def test_without_a_connection_the_refusal_says_what_fetches_it(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match=r"HF_HUB_OFFLINE is set.*\n    hf download Qwen/Tiny --revision v2\n"):
        model_folder(NAME, "v2")
    assert hub.requests == []


def test_a_cache_that_cannot_be_written_to_is_the_machines_matter(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repository(NAME).commit(MODEL)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(DiskError, match=r"path=Qwen/Tiny: the hub's cache .*/file/cache cannot be written: Not a"):
        model_folder(NAME)
    assert main(["chat", NAME, "--prompt", "3+4="]) == EXIT_STOPPED
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "Traceback" not in said


def test_gated_private_and_missing_are_told_apart(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repository("Org/Gated").commit(MODEL)
    hub.repository("Org/Gated").gated = True
    with pytest.raises(NoAccessError, match=r"gated: its owners give access on request.*`hf auth login`") as refusal:
        model_folder("Org/Gated")
    assert "hf download Org/Gated" in str(refusal.value)
    with pytest.raises(NoAccessError, match="answers 401: there is no such model, or it is private and there is no to"):
        model_folder("Org/None")
    log_in(hub, monkeypatch)
    with pytest.raises(HubError, match=r"no folder .*Org/None.* and the hub has no such model \(404 at ") as missing:
        model_folder("Org/None")
    assert not isinstance(missing.value, NoAccessError)
    monkeypatch.setenv("HF_TOKEN", "of-nobody")
    with pytest.raises(NoAccessError, match=r"401: .* the token here is not valid for it"):
        model_folder("Org/None")


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_split_is_read_over_all_its_files(hub: StandInHub) -> None:
    hub.repository("openai/sums", "dataset").commit(SUMS)
    file = read_records(source())
    assert [(record.prompt, record.reference) for record in file.records] == [
        ("a1", "1a"), ("a2", "2a"), ("a3", "3a"), ("b1", "1b")]  # fmt: skip
    assert file.num_duplicates == 1
    assert file.records[3].place.endswith("main/train-00001-of-00002.parquet, row 1")
    assert file.records[1:3] == [file.records[1], file.records[2]]
    assert prompts(source(num_prompts=2)) == ["a1", "a2"]
    assert prompts(source(num_prompts=4, deduplicate=False)) == ["a1", "a2", "a3", "a2"]
    assert prompts(source(split="test")) == ["c1"]
    assert prompts(source(subset="socratic")) == ["d1"]


def test_rows_are_kept_for_verifiers_that_ask_for_them_and_no_file_of_another_kind_is_read(hub: StandInHub) -> None:
    stored = hub.repository("openai/sums", "dataset")
    stored.commit({"train.jsonl": b'{"prompt": "j1", "answer": "1", "level": 3}\n'})
    given = source(subset="")
    assert read_records(given).records[0].row is None
    assert read_records(given, with_rows=True).records[0].row == {"prompt": "j1", "answer": "1", "level": 3}
    stored.commit({"train.jsonl": table("j1")})
    with pytest.raises(ValueError, match=r"train.jsonl is a parquet file"):
        read_records(given)


def test_an_unknown_subset_or_split_is_refused_with_those_that_there_are(hub: StandInHub) -> None:
    hub.repository("openai/sums", "dataset").commit(SUMS)
    for given, message in (
        (source(subset=""), r"openai/sums: has several subsets, main, socratic. Set data source.subset"),
        (source(subset="mian"), r"subset=mian: openai/sums has no such subset; it has main, socratic\."),
        (source(split="dev"), r"split=dev: subset main of openai/sums has no such split; it has test, train\."),
    ):
        with pytest.raises(HubError, match=message):
            read_records(given)


def test_without_a_card_the_names_of_the_files_say_the_split(hub: StandInHub) -> None:
    row = b'{"prompt": "j1", "answer": "1"}\n'
    files = {"train.jsonl": row, "data/validation-00000-of-00001.parquet": table("v1"), "notes.txt": b"x"}
    hub.repository("openai/sums", "dataset").commit(files)
    assert prompts(source(subset="")) == ["j1"]
    assert prompts(source(subset="", split="validation")) == ["v1"]


def test_what_is_neither_parquet_nor_jsonl_is_read_from_the_hubs_conversion(hub: StandInHub) -> None:
    stored = hub.repository("openai/sums", "dataset")
    stored.commit({"sums.csv": b"a,b\n"})
    with pytest.raises(HubError, match=r"the hub keeps no conversion of it \(refs/convert/parquet\)"):
        read_records(source(subset="default"))
    converted = stored.commit({"default/train/0000.parquet": table("x1"), "default/train/0001.parquet": table("x2")},
                              "refs/convert/parquet")  # fmt: skip
    assert prompts(source(subset="default")) == ["x1", "x2"]
    hub.requests.clear()
    assert prompts(source(subset="default", revision=converted)) == ["x1", "x2"]  # as a run that goes on reads it
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (b"---\na: [\n---\n", "metadata of the data set's card cannot be read"),
        (b"---\na: !!python/object/apply:os.getpid []\n---\n", "could not determine a constructor"),
        (b"---\n- a\n---\n", "metadata of the data set's card cannot be read"),
        (b"---\na: \xe9\n---\n", "metadata of the data set's card cannot be read"),
        (b"---\nconfigs: 3\n---\n", "says in a form of its own"),
        (b"---\nconfigs: [{config_name: x, data_files: 7}]\n---\n", "says in a form of its own"),
        (b"---\nconfigs: [{config_name: x, data_files: [{path: a}]}]\n---\n", "says in a form of its own"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused_in_words(hub: StandInHub, card: bytes, message: str) -> None:
    hub.repository("me/set", "dataset").commit({"README.md": card, "train.parquet": table("a")})
    with pytest.raises(HubError, match=message):
        prompts(source(path="me/set", subset=""))


def test_a_data_set_without_rows_or_conversion_is_refused(hub: StandInHub) -> None:
    hub.repository("me/set", "dataset").commit({"README.md": b"", "train.jsonl.gz": b"x"})
    with pytest.raises(HubError, match="holds neither parquet nor jsonl files, and the hub keeps no conversion of it"):
        prompts(source(path="me/set", subset=""))


def test_what_is_no_hub_is_named(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login page, say, that answers 200 to everything."""
    hub.fails = {"/api/": [200, 200]}
    with pytest.raises(UnreachableError, match="does not answer like the hub"):
        model_folder(NAME)
    log_in(hub, monkeypatch)
    with pytest.raises(HubError, match=r"checkpoint\.push_to_hub=me/x"):
        check_may_push("me/x")


def test_an_index_that_is_no_index_is_refused(hub: StandInHub) -> None:
    hub.repository(NAME).commit({**MODEL, "model.safetensors.index.json": b"[]"})
    with pytest.raises(HubError, match="is no index of weights"):
        model_folder(NAME)


def test_a_cache_without_some_of_the_files_is_refused(hub: StandInHub) -> None:
    hub.repository("openai/sums", "dataset").commit(SUMS)
    here = fetched_here(source())
    hub.down = 503
    assert prompts(source()) == ["a1", "a2", "a3", "b1"]
    with pytest.raises(HubError, match=r"no such split; it has train.*\n.*which may hold a part"):
        read_records(source(split="test"))  # of which nothing was fetched
    Path(here.files[1]).unlink()
    with pytest.raises(HubError, match=r"of the 2 files main/train-… only 1 are there.*\n    hf download openai"):
        read_records(source())


def test_rows_that_the_card_counts_are_counted_in_the_cache(hub: StandInHub) -> None:
    hub.repository("openai/sums", "dataset").commit({**SUMS, "README.md": CARD.replace(b"examples: 5", b"examples: 6")})
    fetched_here(source())
    hub.down = 503
    with pytest.raises(HubError, match="lacks a part of split train"):
        read_records(source())


@pytest.mark.parametrize(
    ("files", "card", "chosen"),
    [
        (["a/x.parquet", "a/b/y.parquet"], {"data_files": "a/*.parquet"}, ["a/x.parquet"]),
        (["a/x.parquet", "a/b/y.parquet"], {"data_files": "a/**"}, ["a/x.parquet", "a/b/y.parquet"]),
        (["x1.jsonl", "x2.jsonl", "y.jsonl"], {"data_files": ["x[12].jsonl"]}, ["x1.jsonl", "x2.jsonl"]),
        (["x1.jsonl", "x2.jsonl"], {"data_files": {"train": "x?.jsonl"}}, ["x1.jsonl", "x2.jsonl"]),
        (["d/train.jsonl", "d/test.jsonl", "e/train.jsonl"], {"data_dir": "d"}, ["d/train.jsonl"]),
        (["q/train.parquet"], {"data_dir": "q", "data_files": [{"split": "train", "path": ["*.parquet"]}]},
         ["q/train.parquet"]),
        (["t.jsonl", "t.parquet"], {"data_files": [{"split": "train", "path": "t.*"}]}, ["t.parquet"]),
        (["x+y.jsonl", "xxy.jsonl"], {"data_files": "x+y.jsonl"}, ["x+y.jsonl"]),
    ],
)  # fmt: skip
def test_a_card_says_which_files(files: list[str], card: dict[str, Any], chosen: list[str]) -> None:
    where = Repository("data.train.x.path", "a/b", "dataset")
    given = {"configs": [{"config_name": "main", **card}]}
    assert choose_files(where, files, given, source()) == chosen


# --- commands ---------------------------------------------------------------------------------------------------------


def write_config(folder: Path, **extra: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        json.dumps(
            {
                "model": {"path": NAME},
                "data": {
                    "train": {"sums": {"kind": "hub", "path": "openai/sums", "subset": "main", "split": "train"}
                              | {"verifier": "exact"} | extra},
                },
                "rollout": {"max_response_tokens": 16, "max_prompt_tokens": 16},
            }
        )
    )  # fmt: skip
    return path


def test_validate_says_what_a_run_would_fetch_and_fetches_nothing(
    hub: StandInHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repository(NAME).commit(MODEL)
    hub.repository("openai/sums", "dataset").commit(SUMS)
    path = write_config(tmp_path)
    assert main(["validate", str(path)]) == 0
    said = capsys.readouterr().err
    assert "\n    hf download Qwen/Tiny\nA run would fetch it from the hub." in said
    assert "\n    hf download openai/sums --repo-type dataset\nA run would fetch it from the hub." in said
    assert "is valid" in said
    assert hub.requests == []
    model_folder(NAME)
    fetched_here(source())
    hub.requests.clear()
    assert main(["validate", str(path)]) == 0
    assert "hf download" not in capsys.readouterr().err
    assert hub.requests == []
    assert main(["validate", str(path), "parallel.tp=3"]) == 2  # the model in the cache is looked at
    assert "must divide the model's num_attention_heads" in capsys.readouterr().err
    assert main(["validate", str(path), "data.train.sums.prompt_field=question"]) == 2
    assert "has no such column; it has answer, prompt" in capsys.readouterr().err


def test_validate_warns_without_the_value_of_a_secret(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2secret")
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {NAME}, revision: '${{oc.env:MY_TOKEN}}'}}\n"
        "data: {train: {a: {kind: chain_arithmetic, verifier: chain_arithmetic}}}\n"
    )
    assert main(["validate", str(tmp_path / "run.yaml")]) == 0
    shown = capsys.readouterr()
    assert "hf download Qwen/Tiny --revision ${oc.env:MY_TOKEN}" in shown.err
    assert "hunter2secret" not in shown.out + shown.err


def test_preflight_fetches_the_sizes_alone(hub: StandInHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    assert main(["preflight", str(path)]) == 2
    said = capsys.readouterr().err
    assert "hf auth login" in said
    assert "\nOr name the model's config.json with --model-config." in said
    hub.repository(NAME).commit(MODEL)
    assert main(["preflight", str(path)]) == 0
    assert "A run would fetch it from the hub" in capsys.readouterr().out
    assert [line.rpartition("/")[2] for line in hub.downloads()] == ["config.json"]


def test_chat_takes_a_name(hub: StandInHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repository(NAME).commit(MODEL)
    options = ChatOptions(temperature=0.0, max_tokens=16)
    talk(NAME, "3+4=", options)
    by_name = capsys.readouterr().out
    talk(str(BASE), "3+4=", options)
    assert capsys.readouterr().out == by_name != ""
    assert main(["chat", "Qwen/None", "--prompt", "3+4="]) == 2
    assert "megatron-fipo chat: model=Qwen/None: no folder" in capsys.readouterr().err


def test_convert_takes_a_name(hub: StandInHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repository(NAME).commit(MODEL)
    assert main(["convert", "hf-to-megatron", NAME, str(tmp_path / "out"), "--dry-run"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert main(["convert", "hf-to-megatron", "Qwen/None", str(tmp_path / "out"), "--dry-run"]) != 0
    assert "error: HF_FOLDER=Qwen/None: no folder" in capsys.readouterr().err


def test_a_runs_checkpoint_finds_the_model_that_its_configuration_names(hub: StandInHub, tmp_path: Path) -> None:
    commit = hub.repository(NAME).commit(MODEL)
    hub.repository(NAME).commit({**MODEL, "LICENSE": b"new"})
    checkpoint = tmp_path / "run/checkpoints/step_000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(f"model: {{path: {NAME}, revision: {commit}}}\n")
    named = tmp_path / "cache/models--Qwen--Tiny/snapshots" / commit
    (checkpoint / ".metadata").touch()
    assert find_checkpoint(checkpoint, None) == (checkpoint, named)


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_no_secret_is_recorded_and_another_one_keeps_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["model.path=${oc.env:MODEL_NAME}", "model.revision=${oc.env:BRANCH_TOKEN}", "run.output_dir=."]
    first, moved = "1" * 40, "2" * 40

    def commits_of(branch: str) -> dict[str, Any]:
        monkeypatch.setenv("MODEL_NAME", NAME)
        monkeypatch.setenv("BRANCH_TOKEN", branch)
        config = load_config(None, overrides)
        monkeypatch.setattr(named_on_hub, "model_commit", lambda _: (first if branch == "secret-1" else moved, ""))
        monkeypatch.setattr(named_on_hub, "current_commit", lambda _: moved)
        commits, _ = named_on_hub._find_commits(config, list(named_on_hub._repositories(config)))
        recorded = named_on_hub._recorded(config, commits)
        save_resolved(recorded, tmp_path)
        save_provenance(tmp_path, named_on_hub._origins(commits))
        return recorded_values(recorded)["model"]

    def written() -> str:
        return (tmp_path / "config.yaml").read_text() + (tmp_path / "provenance.json").read_text()

    assert commits_of("secret-1")["revision"] == first
    assert "secret-1" not in written()
    assert commits_of("secret-2")["revision"] == first, "another key is the same run"
    assert "secret-2" not in written()
    overrides[1] = "model.revision=v2"
    assert commits_of("secret-2")["revision"] == moved


# --- pushing ----------------------------------------------------------------------------------------------------------


def pushing(**checkpoint: Any) -> Config:
    config = load_config(None, ["model.path=Qwen/Tiny", "data.train.sums.kind=hub", "data.train.sums.path=openai/sums",
                                "data.train.sums.split=train"])  # fmt: skip
    return replace(config, checkpoint=replace(config.checkpoint, push_to_hub="me/mine", **checkpoint))


ORIGINS = {
    "model": {"hub": NAME, "revision": None, "commit": "1" * 40},
    "data": {"data.train.sums": {"hub": "openai/sums", "revision": None, "commit": "2" * 40}},
}


def fine_grained(*scopes: tuple[str, str]) -> dict[str, Any]:
    scoped = [{"entity": {"name": name}, "permissions": [permission]} for name, permission in scopes]
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}


@pytest.mark.parametrize(
    ("name", "account", "problem"),
    [
        ("me/mine", {}, ""),
        ("org/mine", {"orgs": [{"name": "org", "roleInOrg": "write"}]}, ""),
        ("me/mine", {"auth": fine_grained(("me", "repo.write"))}, ""),
        ("me/mine", {"auth": fine_grained(("me/mine", "repo.write"))}, ""),
        ("me/mine", {"auth": {"accessToken": {"role": "read"}}}, "this token may only read"),
        ("you/mine", {}, "this token is me's, and may write for me, not for you"),
        ("org/mine", {"orgs": [{"name": "org", "roleInOrg": "read"}]}, "me may only read in org"),
        ("me/mine", {"auth": fine_grained(("me", "repo.content.read"))}, "no permission repo.write for me"),
        ("me/mine", {"auth": fine_grained(("you", "repo.write"))}, "no permission repo.write for me"),
    ],
)
def test_the_token_is_looked_at_before_training(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch, name: str, account: dict[str, Any], problem: str
) -> None:
    log_in(hub, monkeypatch, **account)
    if not problem:
        check_may_push(name)
        return
    with pytest.raises(HubError, match=f"checkpoint.push_to_hub={name}: .*{problem}.*`hf auth login`"):
        check_may_push(name)


def test_no_token_a_wrong_one_and_no_hub_are_refused_before_training(
    hub: StandInHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HubError, match="there is no token of the Hugging Face hub here"):
        check_may_push("me/mine")
    monkeypatch.setenv("HF_TOKEN", "of-nobody")
    with pytest.raises(HubError, match=r"the hub does not accept this token \(401\)"):
        check_may_push("me/mine")
    hub.down = 503
    with pytest.raises(HubError, match="cannot be asked whether"):
        check_may_push("me/mine")


def test_what_should_be_private_is_not_pushed_where_everybody_reads(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(hub, monkeypatch)
    hub.repository("me/mine").commit({"README.md": b"there before"})
    problem = r"push_to_hub=me/mine: this repository exists and is public.*hub_private=false"
    with pytest.raises(HubError, match=problem):
        check_may_push("me/mine")
    with pytest.raises(HubError, match=problem):  # it may have come to be during the run
        push(pushing(), tmp_path, tmp_path, ORIGINS)
    assert len(hub.repository("me/mine").commits) == 1
    check_may_push("me/mine", private=False)
    hub.repository("me/mine").private = True
    check_may_push("me/mine")


def test_a_model_is_pushed_with_its_card(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(hub, monkeypatch)
    export, evaluation = tmp_path / "secret-place/huggingface", tmp_path / "evaluation"
    export.mkdir(parents=True)
    evaluation.mkdir()
    for name, content in MODEL.items():
        (export / name).write_bytes(content)
    for when, score in (("before", 0.25), ("after", 0.75)):
        (evaluation / f"{when}.json").write_text(json.dumps({"evaluation/held/avg@4": score}))
    assert push(pushing(), export, evaluation, ORIGINS) == f"{hub.endpoint}/me/mine"
    assert hub.created == [{"name": "mine", "organization": "me", "visibility": "private"}]
    stored = hub.repository("me/mine")
    files = dict(stored.commits[stored.branches["main"]])
    card = files.pop("README.md").decode()
    assert files == MODEL
    assert "base_model: Qwen/Tiny\ndatasets:\n- openai/sums\n" in card
    assert f"openai/sums, split train, at commit {'2' * 40}" in card
    assert "| held/avg@4 | 0.25 | 0.75 |" in card
    for secret in ("a-token", str(tmp_path), "secret-place"):
        assert secret not in card
    push(pushing(hub_private=False), export, evaluation, {})
    assert hub.created[1]["visibility"] == "public"


def test_a_card_shows_no_value_of_a_secret_variable(
    hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(hub, monkeypatch)
    monkeypatch.setenv("SPLIT_TOKEN", "hush-hush")
    config = load_config(None, ["model.path=Qwen/Tiny", "data.train.sums={kind: hub, path: openai/sums, "
                                "split: '${oc.env:SPLIT_TOKEN}'}", "checkpoint.push_to_hub=me/mine"])  # fmt: skip
    push(config, tmp_path, tmp_path, ORIGINS)
    assert "split ${oc.env:SPLIT_TOKEN}, at commit" in (tmp_path / "README.md").read_text()


def test_a_push_that_fails_keeps_the_export(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(hub, monkeypatch)
    hub.refuses_commits = True
    for name, content in MODEL.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(HubError, match="500"):
        push(pushing(), tmp_path, tmp_path, ORIGINS)
    assert {name: (tmp_path / name).read_bytes() for name in MODEL} == MODEL
    assert upload_command(pushing(), Path("out/hf")) == "hf upload me/mine out/hf --private"
    assert "--private" not in upload_command(pushing(hub_private=False), Path("out/hf"))


def test_a_card_of_a_run_on_own_files_names_none_of_them() -> None:
    config = load_config(None, ["model.path=/home/me/secret/model", "data.train.own.kind=jsonl",
                                "data.train.own.path=/home/me/secret/rows.jsonl", "checkpoint.push_to_hub=me/mine",
                                "data.train.own.verifier=http://judge:1/score?key=secret"])  # fmt: skip
    card = model_card(config, {}, {}, {})
    assert "secret" not in card
    assert "own: jsonl" in card
    assert "evaluated on no held-out data" in card
