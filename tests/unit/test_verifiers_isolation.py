"""What judges a model's text runs apart from the trainer: attacks by a response, by a worker, and what is left of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.rl.verifiers import pool as pool_module
from megatron_fipo.rl.verifiers.isolation import Isolation, isolation_of, isolation_warnings
from megatron_fipo.rl.verifiers.pool import VerifierPool, WorkerStartError
from megatron_fipo.rl.verifiers.registry import BUILTIN_VERIFIERS
from megatron_fipo.rl.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.rl.verifiers.worker_process import VerifierUnavailableError

linux = pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")

RUNS_ITS_TEXT = '''
import os
from pathlib import Path
from megatron_fipo.rl.verifiers.verdict import Verdict

data = Path(__file__).with_name("words.txt")

def verify(response_text, reference, finish_reason):
    """Runs what the model wrote, as some scorers do; `found` is what the text brought back."""
    names = {"reference": reference, "data": data}
    exec(response_text, names)
    return Verdict(0.0, repr(names.get("found", "")))
'''
RUNS = "runs_its_text:verify"


@pytest.fixture(scope="module")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of everything that a verifier may read."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "key").write_text("a secret on the disk")
    return folder


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a user's module, on PYTHONPATH, and a secret in the environment."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "runs_its_text.py").write_text(RUNS_ITS_TEXT)
    (folder / "late.py").write_text("value = 'imported late'\n")
    (folder / "words.txt").write_text("some words")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("WANDB_API_KEY", "a secret in the environment")
        yield folder


@pytest.fixture(scope="module")
def running(modules: Path) -> Iterator[VerifierPool]:
    """One worker, so that one response could colour the next."""
    with VerifierPool(timeout_s=60.0, verifiers=[RUNS]) as pool:
        yield pool


def run(pool: VerifierPool, text: str, reference: Any = "") -> Verdict:
    (verdict,) = pool.judge_all([VerifierJob(RUNS, textwrap.dedent(text), reference)])
    return verdict


# ------------------------------------------------------------------------------------------------ a response as code

ATTACKS = {
    "environment": ("import os; found = os.environ.get('WANDB_API_KEY')", "None"),
    "environment of others": (
        """
        import os
        def read(pid):
            try: return open(f"/proc/{pid}/environ").read()
            except OSError as error: return type(error).__name__
        found = {read(pid) for pid in ("self", os.getppid(), reference["pool"])}
        """,
        "{'PermissionError'}",
    ),
    "memory of others": (
        "import os; found = open(f'/proc/{reference[\"pool\"]}/mem', 'rb').read(1)",
        "PermissionError",
    ),
    "ptrace": (
        """
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.ptrace(16, reference["pool"], None, None)
        found = result, ctypes.get_errno() == errno.EPERM
        """,
        "(-1, True)",
    ),
    "another's file": ("found = open(reference['key']).read()", "PermissionError"),
    "a list of files": ("import os; found = os.listdir(reference['folder'])", "PermissionError"),
    "write": ("open(reference['marker'], 'w').write('x')", "PermissionError"),
    "write beside the module": ("data.write_text('other words')", "PermissionError"),
    "delete": ("data.unlink()", "PermissionError"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', reference['port']), 5)", "PermissionError"),
    "local socket": ("import socket; socket.socket(socket.AF_UNIX)", "PermissionError"),
    "fork": ("import os; os.fork()", "PermissionError"),
    "shell": ("import subprocess; found = subprocess.run('echo', capture_output=True)", "PermissionError"),
    "thread": ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
    "signals": ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
    "limits": ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))", "PermissionError|ValueError"),
    "the way to the pool": (
        """
        import os, stat
        def is_socket(fd):
            try: return stat.S_ISSOCK(os.fstat(fd).st_mode)
            except OSError: return False
        found = [fd for fd in range(256) if is_socket(fd)]
        """,
        "[]",
    ),
}


@linux
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_response_that_runs_as_code_reaches_nothing(
    running: VerifierPool, secrets_folder: Path, modules: Path, attack: str
) -> None:
    text, outcome = ATTACKS[attack]
    marker = secrets_folder / "marker"
    with socket.create_server(("127.0.0.1", 0)) as server:
        reference = {
            "pool": os.getpid(),
            "key": str(secrets_folder / "key"),
            "folder": str(secrets_folder),
            "marker": str(marker),
            "port": server.getsockname()[1],
        }
        verdict = run(running, text, reference)
    assert any(part in verdict.error or part == verdict.answer for part in outcome.split("|")), verdict
    assert "secret" not in verdict.answer + verdict.error
    assert not marker.exists()
    assert (modules / "words.txt").read_text() == "some words"


@linux
def test_the_same_attacks_succeed_where_the_verifier_is_trusted(
    modules: Path, secrets_folder: Path, tmp_path: Path
) -> None:
    """That the attacks can do something at all; and what `verifier.trusted` means."""
    with VerifierPool(timeout_s=60.0, verifiers=[RUNS], trusted=[RUNS]) as pool:
        reference = {"key": str(secrets_folder / "key"), "marker": str(tmp_path / "marker")}
        verdicts = [run(pool, ATTACKS[name][0], reference) for name in ("environment", "another's file", "write")]
    assert [verdict.answer for verdict in verdicts] == [
        "'a secret in the environment'",
        "'a secret on the disk'",
        "''",
    ]
    assert (tmp_path / "marker").exists()


FORGERIES = """
import json, os, pickle, struct
class Bomb:
    def __reduce__(self):
        return os.mkdir, (reference,)
verdict = {"score": 1.0, "answer": "forged", "error": "", "done_at": 0.0, "problem": "", "nonce": ""}
body = json.dumps(verdict).encode()
bomb = pickle.dumps(Bomb())
for content in (body, struct.pack(">I", len(body)) + body, struct.pack("!i", len(bomb)) + bomb):
    for fd in range(256):
        try: os.write(fd, content)
        except OSError: pass
"""


@linux
def test_what_a_response_writes_to_every_file_is_no_verdict(running: VerifierPool, tmp_path: Path) -> None:
    marker = tmp_path / "unpickled"
    before = run(running, "found = 'before'")
    forged = run(running, FORGERIES, str(marker))
    assert "what is no JSON" in forged.error
    assert not forged.correct
    assert run(running, "found = 'before'") == before
    assert not marker.exists()


@linux
def test_one_response_does_not_change_how_the_next_is_judged(running: VerifierPool) -> None:
    tampering = """
        import builtins, sys
        import megatron_fipo.rl.verifiers.judging as judging
        from megatron_fipo.rl.verifiers.verdict import Verdict
        for name in ("__main__", "runs_its_text", judging.__name__):
            module = sys.modules[name]
            module.judge = module.verify = lambda *anything: Verdict(1.0, "tampered")
        builtins.repr = lambda value: "tampered"
    """
    assert run(running, tampering).answer == "tampered"  # its own answer it can have as it likes, and no more
    assert run(running, "found = 1") == Verdict(0.0, "1")


@linux
def test_a_verifiers_own_files_late_imports_and_prints_still_work(running: VerifierPool) -> None:
    assert run(running, "found = data.read_text()").answer == "'some words'"
    assert run(running, "import late; found = late.value").answer == "'imported late'"
    assert run(running, "import wave, sqlite3, numpy; found = numpy.arange(3).sum()").error == ""


@linux
def test_a_refusal_names_the_remedy(running: VerifierPool) -> None:
    assert "is named in verifier.trusted" in run(running, "open('/etc/hostname', 'w')").error
    assert "verifier.trusted" not in run(running, "1 / 0").error


# ------------------------------------------------------------------------------------- reasoning-gym, task by task


def gym_entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """An entry of every task of the installed package that can be made without further parameters."""
    from reasoning_gym.factory import DATASETS

    from megatron_fipo.rl.verifiers.reasoning_gym_tasks import open_task

    for task in sorted(DATASETS.keys() - {"composite"}):
        yield task, open_task(task, {}, seed=1, size=1)[0]


@linux
def test_no_task_of_reasoning_gym_runs_its_answer(modules: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = (
        f"[open({str(marker)!r}, 'w'), __import__('os').system('touch {marker}'), "
        "setattr(__import__('sys').modules['__main__'], 'judge_one', lambda *a: 1 / 0), "
        "__import__('os').write(2, __import__('os').environ.get('WANDB_API_KEY').encode())]"
    )
    jobs, rights = [], []
    for task, entry in gym_entries():
        reference = {"task": task, "params": {}, "entry": entry}
        jobs.append(VerifierJob("reasoning_gym", f"<answer>{code}</answer>", reference))
        rights.append(task in ("countdown", "spiral_matrix", "simple_integration", "word_ladder"))
        if rights[-1]:
            jobs.append(VerifierJob("reasoning_gym", f"<answer>{entry['answer']}</answer>", reference))
    assert len(jobs) >= 100
    with VerifierPool(num_workers=2, timeout_s=60.0, verifiers=["reasoning_gym"]) as pool:
        verdicts = pool.judge_all(jobs)
    assert [verdict.error for verdict in verdicts if verdict.error] == []
    accepted = [job.reference["task"] for job, verdict in zip(jobs, verdicts, strict=True) if verdict.correct]
    assert accepted == ["countdown", "simple_integration", "spiral_matrix", "word_ladder"]
    assert not marker.exists()
