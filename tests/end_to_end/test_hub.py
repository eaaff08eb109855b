"""A run whose model and data are names on the hub, here a stand-in of it on this machine."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import yaml
from huggingface_hub import constants

from tests.end_to_end.runs import on_ranks
from tests.hub_stand_in import StandInHub, serve

ROOT = Path(__file__).parents[2]
MODEL = {file.name: file.read_bytes() for file in (ROOT / "examples/quickstart/base").iterdir()}
CONFIG = {
    "algorithm": "grpo",
    "run": {"output_dir": "out", "num_sample_prints": 0},
    "model": {"path": "Qwen/Tiny"},
    "data": {
        "train": {"sums": {"kind": "hub", "path": "openai/sums", "split": "train", "verifier": "exact"}},
        "evaluation": {"held_out": {"kind": "hub", "path": "openai/sums", "split": "test", "verifier": "exact"}},
    },
    "rollout": {"num_prompts": 2, "num_samples_per_prompt": 2, "max_prompt_tokens": 8, "max_response_tokens": 8},
    "train": {"num_steps": 1, "num_minibatches": 1},
    "optimizer": {"num_warmup_steps": 0},
    "evaluation": {"num_samples_per_prompt": 1},
    "metrics": {"tensorboard": False},
    "checkpoint": {"push_to_hub": "me/my-model"},
}


def table(first: int) -> bytes:
    file = io.BytesIO()
    rows = [{"prompt": f"{first}+{other}=", "answer": str(first + other)} for other in range(1, 5)]
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def environment(hub: StandInHub, folder: Path) -> dict[str, str]:
    """Variables by which the client finds the stand-in, keeps its cache in the folder, and logs in."""
    return {
        **{"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"},
        **{"HF_TOKEN": "a-token", "COLUMNS": "400"},
    }


def start(hub: StandInHub, folder: Path, *, ranks: int) -> tuple[int, str]:
    """Train in processes of the project's launcher, and return how it ended and what it said."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fipo.cli", "train", "run.yaml", "--nproc", str(ranks)],
        cwd=folder,
        env={**variables, **environment(hub, folder), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


def start_again(hub: StandInHub, folder: Path, *overrides: str, ranks: int, offline: bool = False) -> tuple[int, str]:
    """The same on forked ranks, whose client reads its variables anew."""
    variables = environment(hub, folder) | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    outcomes = on_ranks(
        ["run.yaml", *overrides],
        ranks,
        folder / "logs",
        mark=str(folder),
        prepare=partial(_as_if_started_with, variables, folder),
    )
    (code,) = {outcome.code for outcome in outcomes}
    return code, "".join(outcome.output for outcome in outcomes)


def _as_if_started_with(variables: dict[str, str], folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith("HF_")]:
        del os.environ[name]
    os.environ |= variables
    importlib.reload(constants)
    os.chdir(folder)


def test_a_run_by_names(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    hub = StandInHub()
    hub.accounts["a-token"] = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
    model = hub.repository("Qwen/Tiny").commit(MODEL)
    data = hub.repository("openai/sums", "dataset").commit({"train.parquet": table(1), "test.parquet": table(2)})
    with serve(hub):
        code, said = start(hub, tmp_path, ranks=2)
        assert code == 0, said
        assert f"fetching Qwen/Tiny from the Hugging Face hub, at commit {model}" in said
        assert f"{hub.endpoint}/me/my-model" in said
        assert set(Counter(hub.downloads()).values()) == {1}  # two ranks on one node: each file once
        _check_what_is_written(hub, tmp_path / "out", model, data)

        # The branch moves; the run that goes on does not, says so, and fetches nothing. Its push fails: no failure.
        hub.repository("Qwen/Tiny").commit({**MODEL, "LICENSE": b"new"})
        hub.requests.clear()
        hub.refuses_commits = True
        code, said = start_again(hub, tmp_path, "train.num_steps=2", ranks=1)
        assert code == 0, said
        assert "resumed from" in said
        assert f"this run goes on with {model}, with which it began" in " ".join(said.split())
        assert hub.downloads() == []
        assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["model"]["revision"] == model
        assert "THE MODEL IS NOT ON THE HUB" in said
        assert "\n    hf upload me/my-model out/huggingface --private\n" in said
        assert (tmp_path / "out/huggingface/model.safetensors").is_file()

        # The same command again trains nothing, and makes up the push.
        hub.refuses_commits = False
        code, said = start_again(hub, tmp_path, "train.num_steps=2", ranks=1)
        assert code == 0, said
        assert "the run is finished" in said
        assert f"{hub.endpoint}/me/my-model" in said
        stored = hub.repository("me/my-model")
        pushed = stored.commits[stored.branches["main"]]["model.safetensors"]
        assert pushed == (tmp_path / "out/huggingface/model.safetensors").read_bytes()


def test_what_the_hub_does_not_give_is_refused_on_every_rank_and_once(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    with serve(StandInHub()) as hub:
        code, said = start_again(hub, tmp_path, "checkpoint.push_to_hub=", ranks=2, offline=True)
    assert code == 2
    assert said.count("error: model.path=Qwen/Tiny: no folder") == 1
    assert "\n    hf download Qwen/Tiny\n" in said
    assert "Traceback" not in said
    assert hub.requests == []
    assert not (tmp_path / "out").exists()


def _check_what_is_written(hub: StandInHub, out: Path, model: str, data: str) -> None:
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["model"] == {"hub": "Qwen/Tiny", "revision": None, "commit": model}
    source = {"hub": "openai/sums", "revision": None, "commit": data}
    assert provenance["data"] == {"data.train.sums": source, "data.evaluation.held_out": source}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["model"]["path"], config["model"]["revision"]) == ("Qwen/Tiny", model)
    assert config["data"]["train"]["sums"]["revision"] == data
    stored = hub.repository("me/my-model")
    files = stored.commits[stored.branches["main"]]
    assert files["model.safetensors"] == (out / "huggingface/model.safetensors").read_bytes()
    assert b"base_model: Qwen/Tiny" in files["README.md"]
    assert b"| held_out/avg@1 |" in files["README.md"]
    for file in out.rglob("*"):
        assert not file.is_file() or b"a-token" not in file.read_bytes(), file
