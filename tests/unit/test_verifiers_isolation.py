"""Verifiers are isolated from the trainer: attacks by a response and by a worker fail."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.verifiers import pool as pool_module
from megatron_fipo.verifiers.isolation import Isolation, isolation_of, isolation_warnings
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS
from megatron_fipo.verifiers.pool import VerifierPool, WorkerStartError
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.verifiers.worker_process import VerifierUnavailableError

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="confinement is Linux's")

RUNS_ITS_TEXT = '''
import os
from pathlib import Path
from megatron_fipo.verifiers.verdict import Verdict

data = Path(__file__).with_name("words.txt")

def verify(response_text, reference, finish_reason):
    """Runs the response as code, as some scorers do; the verdict's answer is the variable `found` that it sets."""
    names = {"reference": reference, "data": data}
    exec(response_text, names)
    return Verdict(0.0, repr(names.get("found", "")))
'''
RUNS = "runs_its_text:verify"


@pytest.fixture(scope="module")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no verifier may read."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "key").write_text("a secret on the disk")
    return folder


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on PYTHONPATH with a user's modules; the environment contains a secret."""
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
    """A pool with one worker, so that one response could affect the next."""
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
    assert "a secret" not in verdict.answer + verdict.error
    assert not marker.exists()
    assert (modules / "words.txt").read_text() == "some words"


@linux
def test_the_same_attacks_succeed_where_the_verifier_is_trusted(
    modules: Path, secrets_folder: Path, tmp_path: Path
) -> None:
    """Negative control: the attacks work where nothing is confined, which is what `verifier.trusted` means."""
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
    assert "data that is not JSON" in forged.error
    assert not forged.correct
    assert run(running, "found = 'before'") == before
    assert not marker.exists()


@linux
def test_one_response_does_not_change_how_the_next_is_judged(running: VerifierPool) -> None:
    tampering = """
        import builtins, sys
        import megatron_fipo.verifiers.judging as judging
        from megatron_fipo.verifiers.verdict import Verdict
        for name in ("__main__", "runs_its_text", judging.__name__):
            module = sys.modules[name]
            module.judge = module.verify = lambda *anything: Verdict(1.0, "tampered")
        builtins.repr = lambda value: "tampered"
    """
    assert run(running, tampering).answer == "tampered"  # it can forge its own verdict, but no other
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
    """One entry of every task of the installed package except composite, which needs parameters."""
    from reasoning_gym.factory import DATASETS

    from megatron_fipo.verifiers.reasoning_gym_tasks import open_task

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
    jobs = []
    right = ["countdown", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix"]
    for task, entry in gym_entries():
        reference = {"task": task, "params": {}, "entry": entry}
        # Its scorer takes any text for "yes": bool(answer) == bool("True").
        if task != "game_of_life_halting":
            jobs.append(VerifierJob("reasoning_gym", f"<answer>{code}</answer>", reference))
        if task == "boxnet":  # its scorer raises, and knows no right answer
            jobs.append(VerifierJob("reasoning_gym", "<answer>[[]]</answer>", reference))
        if task in right:
            jobs.append(VerifierJob("reasoning_gym", f"<answer>{entry['answer']}</answer>", reference))
    assert len(jobs) >= 100
    with VerifierPool(num_workers=2, timeout_s=60.0, verifiers=["reasoning_gym"]) as pool:
        verdicts = pool.judge_all(jobs)
        # Formatting an exception reads files, which no scorer may; the worker survives and reports the exception.
        (unjudged,) = pool.judge_all([VerifierJob("reasoning_gym", "4", {"task": "countdown"})])
    assert "is a mapping with task, params and entry" in unjudged.error
    assert [verdict.error for verdict in verdicts if verdict.error] == []
    accepted = [job.reference["task"] for job, verdict in zip(jobs, verdicts, strict=True) if verdict.correct]
    assert accepted == right
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------- what workers know


@linux
def test_workers_know_no_secret_and_their_command_lines_neither(modules: Path) -> None:
    url = "http://127.0.0.1:9/score?key=a-secret-in-a-name"
    names = [RUNS, "math", "code", "reasoning_gym", url]
    others = children_running("megatron_fipo.verifiers.worker")
    with VerifierPool(verifiers=names) as pool:
        pool.wait_until_ready()
        workers = [worker for worker in children_running("megatron_fipo.verifiers.worker") if worker not in others]
        assert len(workers) == len({isolation_of(name) for name in names}) == 5
        for worker in workers:
            environment = (worker / "environ").read_bytes()
            assert b"PATH=" in environment
            assert b"secret" not in environment + (worker / "cmdline").read_bytes()
            assert os.readlink(worker / "fd/0") == os.devnull


def children_running(module: str) -> list[Path]:
    """The folders in /proc of this process's children that run a module."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and module.encode() in (folder / "cmdline").read_bytes():
                found.append(folder)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_every_name_has_its_kind() -> None:
    kinds = {name: isolation_of(name) for name in BUILTIN_VERIFIERS}
    assert {name for name, kind in kinds.items() if kind is Isolation.PROGRAMS} == {"code", "code_unprotected"}
    assert isolation_of("reasoning_gym").is_forked
    assert isolation_of("judges:verify") is Isolation.OWN
    assert isolation_of("judges:verify").is_forked
    assert isolation_of("judges:verify", ["judges:verify"]) is Isolation.TRUSTED
    assert isolation_of("https://host/score") is Isolation.REMOTE
    for name, path in BUILTIN_VERIFIERS.items():
        assert isolation_of(path) is isolation_of(name)


def test_a_kernel_without_landlock_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for has, expected in ((True, []), (False, ["judges:verify can read files"])):
        monkeypatch.setattr("megatron_fipo.verifiers.isolation.has_landlock", lambda has=has: has)
        warnings = isolation_warnings(["math", "judges:verify"], [])
        assert [part in warning for part, warning in zip(expected, warnings, strict=True)] == [True] * len(expected)
        assert isolation_warnings(["math", "judges:verify"], ["judges:verify"]) == []


NOWHERE = """
import platform, sys
platform.machine = lambda: "riscv64"
from megatron_fipo.verifiers.isolation import Isolation, WorkerSetup
from megatron_fipo.verifiers.worker import CannotJudgeError, start
name, isolation = sys.argv[1:]
try:
    start(WorkerSetup((name,), Isolation(isolation), 1.0, 8.0), -1)
except CannotJudgeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "kind", "refused"),
    [("reasoning_gym", "evaluating", True), (RUNS, "own", True), ("math", "computing", False)],
)
def test_where_nothing_can_be_confined_what_evaluates_text_is_refused(
    modules: Path, name: str, kind: str, refused: bool
) -> None:
    path = os.pathsep.join([str(Path(pool_module.__file__).parents[2]), str(modules)])
    run = subprocess.run(
        [sys.executable, "-c", NOWHERE, name, kind],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    said = f"verifier {name} cannot be used here: a response may run as code in it, so it must be confined, and"
    assert (said in run.stdout) is refused
    assert (f"set verifier.trusted=[{name}]" in run.stdout) is refused


# ------------------------------------------------------------------------------------------------ workers that attack


TALKS_BACK = r"""
import os, pickle, struct
from megatron_fipo.verifiers.verdict import Verdict

class Bomb:
    def __init__(self, folder):
        self.folder = folder
    def __reduce__(self):
        return os.mkdir, (self.folder,)

def is_open_for_writing(fd):
    try:
        os.write(fd, b"")
    except OSError:
        return False
    return fd > 2

def verify(response_text, reference, finish_reason):
    if response_text == "judge":
        return Verdict(1.0, "\ud800\x1b[31m", error="")
    frame = lambda body: struct.pack(">I", len(body)) + body
    content = {
        "pickle": lambda: frame(pickle.dumps(Bomb(reference))),
        "bare pickle": lambda: pickle.dumps(Bomb(reference)),
        "score": lambda: frame(b'{"score": 2, "answer": "", "error": "", "done_at": 1}'),
        "true": lambda: frame(b'{"score": true, "answer": "", "error": "", "done_at": 1}'),
        "nan": lambda: frame(b'{"score": NaN, "answer": "", "error": "", "done_at": 1}'),
        "number": lambda: frame(b'{"score": 1, "answer": 7, "error": "", "done_at": 1}'),
        "no time": lambda: frame(b'{"score": 1, "answer": "", "error": ""}'),
        "list": lambda: frame(b"[1]"),
        "deep": lambda: frame(b"[" * 100_000),
        "huge": lambda: struct.pack(">I", 2**31),
        "half": lambda: struct.pack(">I", 1000) + b"{",
    }[response_text]()
    for fd in filter(is_open_for_writing, range(3, 1024)):
        os.write(fd, content)
    while response_text == "half":
        pass
    return Verdict(0.0)
"""
TALKS = "talks_back:verify"


def test_whatever_a_worker_sends_is_data(modules: Path, tmp_path: Path) -> None:
    (modules / "talks_back.py").write_text(TALKS_BACK)
    forged = {
        "pickle": "data that is not JSON",
        "bare pickle": "a message of",
        "score": "a score that is not a number in [0, 1]: 2",
        "true": "a score that is not a number in [0, 1]: True",
        "nan": "a score that is not a number in [0, 1]: nan",
        "number": "an answer or an error that is not a text",
        "no time": "a time that is not a finite number",
        "list": "data that is not a JSON object",
        "deep": "data that is not JSON",
        "huge": "a message of 2147483648 bytes",
        "half": "took longer than verifier.timeout_s=5",
    }
    bomb = tmp_path / "unpickled"
    jobs = [VerifierJob(TALKS, text, str(bomb)) for text in [*forged, "judge"]]
    # Trusted, so that it has the connection to the pool, which no confined verifier has.
    with VerifierPool(num_workers=2, timeout_s=5.0, verifiers=[TALKS], trusted=[TALKS]) as pool:
        *verdicts, good = pool.judge_all(jobs)
    for text, verdict in zip(forged, verdicts, strict=True):
        assert forged[text] in verdict.error, text
        assert not verdict.correct
    assert not bomb.exists()
    assert good == Verdict(1.0, r"\ud800\x1b[31m")


# --------------------------------------------------------------------------------------------- starting, and its ends

DIES_AT_ITS_START = """
import os, signal
from pathlib import Path
from megatron_fipo.verifiers.verdict import Verdict

starts = Path(__file__).with_name("starts")
starts.mkdir(exist_ok=True)
(starts / str(os.getpid())).touch()
if len(list(starts.iterdir())) < {lives_at}:
    os.kill(os.getpid(), signal.SIGKILL)

def verify(response_text, reference, finish_reason):
    return Verdict(1.0)
"""


def test_a_worker_killed_while_it_starts_is_started_again(
    modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.01)
    (tmp_path / "dies.py").write_text(DIES_AT_ITS_START.format(lives_at=3))
    with VerifierPool(timeout_s=60.0, verifiers=["dies:verify"]) as pool:
        assert pool.judge_all([VerifierJob("dies:verify", "", "")]) == [Verdict(1.0)]
    assert len(list((tmp_path / "starts").iterdir())) == 3


def test_one_that_is_killed_each_time_ends_the_run_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(pool_module, "MAX_START_ATTEMPTS", 2)
    (tmp_path / "dies.py").write_text(DIES_AT_ITS_START.format(lives_at=99))
    with VerifierPool(verifiers=["dies:verify"]) as pool, pytest.raises(WorkerStartError, match="started 2 times"):
        pool.wait_until_ready()


@linux
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_package", "'no_such_package'.*(Install that package into this environment|not installed)"),
        ("import sys; sys.exit('no')", r"SystemExit: no \(.*broken.py:1\)"),
        ("1 / 0", r"ZeroDivisionError: division by zero \(.*broken.py:1\)"),
        ("def verify(:", r"SyntaxError: invalid syntax \(broken.py, line 1\)"),
        (
            "from threading import Event, Thread\nThread(target=Event().wait, daemon=True).start()\nverify = print",
            r"its process has other threads \(1\) and must fork for each response. Start threads where they are needed",
        ),
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 3600.0)  # a second try would never come
    (tmp_path / "broken.py").write_text(source)
    with VerifierPool(verifiers=["broken:verify"]) as pool, pytest.raises(VerifierUnavailableError, match=words):
        pool.wait_until_ready()


LEAVES_FILES = """
import tempfile, time
from megatron_fipo.verifiers.verdict import Verdict

folder = tempfile.mkdtemp()

def verify(response_text, reference, finish_reason):
    open(tempfile.mkdtemp() + "/left", "w").close()
    if response_text == "hang":
        while True:
            pass
    return Verdict(1.0, folder)
"""


def test_nothing_is_left_of_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "leaves_files.py").write_text(LEAVES_FILES)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    name = "leaves_files:verify"
    with VerifierPool(timeout_s=1.0, verifiers=[name, "math"], trusted=[name]) as pool:
        hung, judged = pool.judge_all([VerifierJob(name, text, "") for text in ("hang", "right")])
        assert "took longer" in hung.error
        assert judged.answer.startswith(str(temporary))
        assert len(list(temporary.iterdir())) == 2
    assert list(temporary.iterdir()) == []
