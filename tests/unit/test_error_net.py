"""How commands end: words, exit codes, and a traceback only where this program is at fault."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo import cli
from megatron_fipo.config import load_config
from megatron_fipo.parallel.say_once import say_once
from megatron_fipo.system import error_net
from megatron_fipo.system.error_net import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED, report

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart/fipo.yaml"


def told(action: Callable[[], object]) -> tuple[str, int]:
    """(what is said, exit code) of an error."""
    said: list[str] = []
    try:
        action()
    except Exception as error:  # noqa: BLE001 - it stands for a command's
        code = report(error, said.append)
    (text,) = said
    return text, code


def fail(error: Exception) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "code", "fragment"),
    [
        (fail(ValueError("train.num_steps=0: must be at least 1.")), EXIT_BAD_INPUT, "error: train.num_steps=0: must"),
        (lambda: b"\xff".decode(), EXIT_BAD_INPUT, "tests/unit/test_error_net.py"),
        (lambda: Path("/none/such").read_text(), EXIT_BAD_INPUT, "No such file or directory: /none/such"),
        (fail(OSError("org/model does not appear to have a file")), EXIT_BAD_INPUT, "does not appear to have a file"),
        (
            fail(OSError(errno.ENOSPC, "No space left on device", "/full/x")),
            EXIT_STOPPED,
            "No space left on device: /full/x",
        ),
        (fail(OSError(errno.EIO, "Input/output error")), EXIT_STOPPED, "Input/output error"),
        (fail(MemoryError()), EXIT_STOPPED, "out of memory: this process got no more. Lower batch.max_tokens"),
        (fail(torch.OutOfMemoryError("CUDA out of memory")), EXIT_STOPPED, "out of memory: CUDA out of memory"),
        (
            fail(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")),
            EXIT_STOPPED,
            "another process",
        ),
        (
            fail(dist.DistNetworkError("The client socket has failed: TCPStore")),
            EXIT_STOPPED,
            "another process of the run",
        ),
        (fail(RuntimeError("shapes differ")), EXIT_FAULT, "RuntimeError in "),
        (lambda: {}["x"], EXIT_FAULT, "KeyError in "),
        (lambda: 1 // 0, EXIT_FAULT, "ZeroDivisionError in "),
        (fail(AssertionError()), EXIT_FAULT, "This is a fault of megatron_fipo"),
    ],
)
def test_errors_end_in_words_and_codes(action: Callable[[], object], code: int, fragment: str) -> None:
    text, returned = told(action)
    assert returned == code
    assert fragment in text
    assert ("Traceback" in text) == (code == EXIT_FAULT)
    last = text.splitlines()[-1]
    assert last.startswith("error: ")
    if code == EXIT_FAULT:
        assert "Please report it" in last


@pytest.mark.parametrize("command", ["train", "validate", "preflight", "evaluate", "certify", "submit"])
def test_the_same_mistake_has_the_same_exit_code(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(QUICKSTART), "train.num_step=3"]) == EXIT_BAD_INPUT
    output = capsys.readouterr()
    assert "Did you mean train.num_steps?" in output.err
    assert "Traceback" not in output.err + output.out


@pytest.mark.parametrize("command", ["train", "validate", "preflight", "evaluate", "certify"])
def test_so_has_a_fault_of_this_program(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a key that is always there")

    monkeypatch.setattr("megatron_fipo.config.load_config", broken)
    assert cli.main([command, str(QUICKSTART)]) == EXIT_FAULT
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "This is a fault of megatron_fipo" in lines[-1]


def test_final_lines_hold_no_control_codes_and_no_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_KEY", "s3cret-of-the-net")
    load_config(QUICKSTART, ["data.train.chains.verifier=http://host:1/score?key=${oc.env:RM_KEY}"])
    message = "error: http://host:1/score?key=s3cret-of-the-net said \x1b]52;c;eA==\x07\u202e\ud800"
    for say in (say_once, error_net.say_on_stderr):
        say(message)
        printed = capsys.readouterr().err
        assert printed.rstrip("\n").isprintable()
        assert "key=${oc.env:RM_KEY} said \\x1b]52" in printed


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"num_attention_heads": 0}, "no whole number for num_attention_heads"),
        ({"hidden_size": "large"}, "no whole number for hidden_size"),
        ({"num_key_value_heads": True}, "no whole number for num_key_value_heads"),
        ({"head_dim": 1.5}, "no whole number for head_dim"),
        (b"\xff{}", "config.json, line 1: byte 0xff is no UTF-8"),
        ("{".encode("utf-16"), "is encoded in UTF-16"),
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (b"[]", "holds a list; an object was expected"),
    ],
    ids=str,
)
def test_a_broken_config_json_is_bad_input(
    tmp_path: Path, change: dict[str, object] | bytes, fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((QUICKSTART.parent / "base" / "config.json").read_text())
    content = change if isinstance(change, bytes) else json.dumps(whole | change).encode()
    (tmp_path / "config.json").write_bytes(content)
    for command in ("train", "validate"):
        assert cli.main([command, str(QUICKSTART), "parallel.cp=1", f"model.path={tmp_path}"]) == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert fragment in error
        assert str(tmp_path) in error
        assert "Traceback" not in error


def test_a_configuration_of_bytes_is_bad_input_without_a_traceback(tmp_path: Path) -> None:
    """As a process, where whatever is not caught would be seen."""
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run: {name: \xff}\n")
    command = [sys.executable, "-m", "megatron_fipo.cli", "validate", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == EXIT_BAD_INPUT
    assert run.stderr.startswith(f"megatron-fipo validate: configuration file {path}, line 1: byte 0xff is no UTF-8")
    assert len(run.stderr.splitlines()) == 1
