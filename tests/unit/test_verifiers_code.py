"""Code is run against its tests; a program that means harm cannot hang, crash or escape."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_fipo.verifiers import sandbox, syscall_filter
from megatron_fipo.verifiers.code import verify, verify_unprotected
from megatron_fipo.verifiers.code_blocks import extract_program
from megatron_fipo.verifiers.code_reference import read_reference
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.sandbox import Limits, Outcome, run_python
from megatron_fipo.verifiers.syscall_filter import SandboxUnavailableError
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob

SUM = {"tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
ECHO = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3", "7\n"]}
LIMITS = Limits(wall_s=30.0, memory_bytes=2**29, output_bytes=10_000)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
        reason="programs are judged on Linux, x86_64 and aarch64, only",
    ),
]


def judge(response: str, reference: Any, timeout_s: float = 60.0) -> Verdict:
    return verify.judge(VerifierJob("code", response, reference), timeout_s)


def run(program: str, **settings: Any) -> Outcome:
    return run_python(program, limits=settings.pop("limits", LIMITS), **settings)


# ---------------------------------------------------------------------------------------------------- right and wrong


@pytest.mark.parametrize(
    ("response", "reference", "correct"),
    [
        ("Like so:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", SUM, True),
        ("def add(a, b):\n    return a + b\n", SUM, True),
        ("```python\ndef add(a, b):\n    return a - b\n```", SUM, False),
        ("```python\ndef add(a, b)\n    return a + b\n```", SUM, False),
        ("```python\ndef plus(a, b):\n    return a + b\n```", SUM, False),
        ("```\ndef add(a, b): return a - b\n```\nNo:\n```py\ndef add(a, b): return a + b\n```", SUM, True),
        ("I do not know.", SUM, False),
        ("", SUM, False),
        ("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(add(*input()))", SUM, True),
        ("a, b = map(int, input().split())\nprint(a + b)", ECHO, True),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())), '  ')\nsys.exit(0)", ECHO, True),
        ("def main():\n    print(3)\nif __name__ == '__main__':\n    main()", ECHO, False),
        ("print(3)\nprint(7)", ECHO, False),
        ("print(sum(map(int, input().split())))\nraise SystemExit(1)", ECHO, False),
        ("    return a + b", {**SUM, "prompt": "def add(a, b):\n"}, True),
        ("```python\n    return a + b\n```", {**SUM, "prompt": "def add(a, b):\n"}, True),
        (
            "```python\ndef add(a, b):\n    return a + b\n```",
            {**SUM, "prompt": "import math\ndef add(a, b):\n    '''.'''\n"},
            True,
        ),
        (
            "def add(a, b): return a + b",
            {"tests": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"},
            True,
        ),
        (
            "def add(a, b): return a * b",
            {"tests": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"},
            False,
        ),
        ("def add(a, b): return a + b", json.dumps(SUM), True),
    ],
)
def test_code(response: str, reference: Any, correct: bool) -> None:
    verdict = judge(response, reference)
    assert verdict.correct is correct
    assert not verdict.error


def test_extracting_the_program() -> None:
    assert extract_program("1.\n   ```python\n   def f():\n       pass\n   ```") == "def f():\n    pass"
    assert extract_program("```python\nold\n```\n```python\nnever closed") == "old"
    assert extract_program("```python\nnever closed") == "never closed"
    assert extract_program("```text\nx = 1\n```python\ny = 2\n```") == "y = 2"
    assert judge("x = 1\n" * 10_000, SUM) == Verdict(0.0)


@pytest.mark.parametrize(
    "reference",
    [
        "assert f(1)",
        "[1]",
        {},
        {"tests": ""},
        {"tests": "t", "inputs": ["1"]},
        {"inputs": ["1"], "outputs": []},
        None,
        5,
    ],
)
def test_malformed_references_are_refused(reference: Any) -> None:
    with pytest.raises(ValueError, match="a code reference"):
        read_reference(reference)


# ------------------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("while True: pass", "took longer than 0.5 s"),
        ("import time; time.sleep(1000)", "took longer than 0.5 s"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", "took longer than 0.5 s"),
        ("9**9**9", "took longer than 0.5 s"),
        ("x = bytearray(1 << 32)", "exit code 1"),
        ("x = []\nwhile True: x.append(' ' * 10**6)", "exit code 1"),
        ("while True: print('x' * 1000)", "wrote more than 10000 bytes"),
        ("import os\nwhile True: os.write(3, b'x')\n", "exit code 1"),
        ("def f(): f()\nf()", "exit code 1"),
        ("import ctypes; ctypes.string_at(0)", "signal SIGSEGV"),
        ("import os; os.abort()", "signal"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()", ""),
    ],
)
def test_limits(program: str, problem: str) -> None:
    wall_s = 0.5 if problem.startswith("took longer") or not problem else 60.0
    outcome = run(program, limits=Limits(wall_s=wall_s, memory_bytes=2**29, output_bytes=10_000))
    assert not outcome.passed
    assert problem in outcome.problem


def test_leaving_before_the_tests_is_no_pass() -> None:
    for leave in ("import os; os._exit(0)", "raise SystemExit", "import sys; sys.exit(0)"):
        outcome = run(leave, tests="assert False")
        assert not outcome.passed
    assert run("import os; os._exit(0)", tests="assert True").problem == "it ended before its tests had run"
    assert run("", tests="assert True").passed


# ------------------------------------------------------------------------------------------------------------ escapes

ESCAPES = {
    "a new process": "import os\nos.fork()",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a shell": "import subprocess\nsubprocess.run(['true'], check=True)",
    "os.system": "import os\nassert os.system('true') == 0",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing as m\np = m.Process()\np.start()\np.join()\nassert p.exitcode == 0",
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', PORT)).close()",
    "a socket": "import socket\nsocket.socket()",
    "a Unix socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "writing a file elsewhere": "open('ELSEWHERE/new', 'w').write('x')",
    "changing a file": "open('ELSEWHERE/old', 'r+').write('x')",
    "deleting a file": "import os\nos.remove('ELSEWHERE/old')",
    "renaming a file": "import os\nos.rename('ELSEWHERE/old', 'ELSEWHERE/new')",
    "a folder": "import os\nos.mkdir('ELSEWHERE/new')",
    "a link": "import os\nos.symlink('/', 'ELSEWHERE/new')",
    "permissions": "import os\nos.chmod('ELSEWHERE/old', 0o777)",
    "a big file": "open('big', 'wb').write(bytes(10**8))",
    "ending its parent": "import os\nos.kill(os.getppid(), 0)",
    "ending everything": "import os\nos.kill(-1, 0)",
    "its group": "import os\nos.killpg(0, 0)",
    "C: a socket": "import ctypes\nassert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
    "C: a new process": "import ctypes\nlibc = ctypes.CDLL(None)\npid = libc.fork()\nassert pid >= 0",
    "C: deleting a file": "import ctypes\nassert ctypes.CDLL(None).unlink(b'ELSEWHERE/old') == 0",
    "C: writing a file": "import ctypes\nassert ctypes.CDLL(None).open(b'ELSEWHERE/new', 0o101, 0o600) >= 0",
    "C: a trace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, ctypes.CDLL(None).getppid(), 0, 0) == 0",
    "C: memory of the parent": "open(f'/proc/{__import__(\"os\").getppid()}/mem', 'rb').read(1)",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "a signal by file descriptor": "import fcntl, os\nfcntl.fcntl(1, 8, os.getppid())",
    "another root": "import os\nos.chroot('.')",
    "another user": "import os\nos.setuid(12345)",
    "the environment": "import os\nassert 'SECRET_OF_THE_TRAINER' in os.environ",
    "packages": "import pyarrow",
}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "1")
    (tmp_path / "old").write_text("old")
    tmp_path.chmod(0o755)
    return tmp_path


def filled(program: str, elsewhere: Path, port: int) -> str:
    return program.replace("ELSEWHERE", str(elsewhere)).replace("PORT", str(port))


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_fail(name: str, elsewhere: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = filled(ESCAPES[name], elsewhere, server.getsockname()[1])
        outcome = run(program + "\nprint('escaped')")
    assert not outcome.passed
    assert b"escaped" not in outcome.stdout
    assert sorted(path.name for path in elsewhere.iterdir()) == ["old"]
    assert (elsewhere / "old").read_text() == "old"


@pytest.mark.parametrize(
    "name",
    [
        "a new process",
        "a shell",
        "the network",
        "writing a file elsewhere",
        "deleting a file",
        "ending its parent",
        "C: a socket",
        "C: writing a file",
        "C: a new process",
        "another program",
    ],
)
def test_without_protection_the_same_escapes_succeed(name: str, elsewhere: Path) -> None:
    """Negative control: without protection, these programs succeed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = filled(ESCAPES[name], elsewhere, server.getsockname()[1])
        # Written files stay empty here, too: that limit holds without the filter.
        outcome = run(program.replace(".write('x')", ""), protected=False)
    assert outcome.passed, outcome.problem


def test_files_cannot_be_read_where_the_kernel_has_landlock(elsewhere: Path) -> None:
    if not _kernel_has_landlock():
        pytest.skip("this kernel has no Landlock; what cannot be hidden there is documented")
    for path in (elsewhere / "old", Path("/etc/passwd"), Path("/proc/self/environ"), Path(__file__)):
        assert not run(f"print(open({str(path)!r}).read())").passed
    assert run("import os\nassert os.listdir('.') == [] and dict(os.environ) == {}").passed


def _kernel_has_landlock() -> bool:
    import ctypes

    return ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)) > 0


def test_what_honest_programs_need_works() -> None:
    program = """
import bisect, collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
import operator, random, re, statistics, string, sys, threading, typing, unittest, zoneinfo
sys.setrecursionlimit(10**6)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
results = []
thread = threading.Thread(target=lambda: results.append(depth(20_000)))
thread.start(); thread.join()
print(results, random.Random(0).random(), list({'a', 'b', 'c', 'd'}))
print(json.dumps({"e": math.e}), hashlib.sha256(b"").hexdigest()[:4], file=sys.stderr)
print("é", input())
"""
    first, second = (run(program, stdin="ü\n") for _ in range(2))
    assert first.passed, first.problem
    assert first == second  # the order of a set of texts, too
    assert first.stdout.decode().splitlines()[-1] == "é ü"


def test_folders_are_deleted_and_processes_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {process.pid for process in psutil.Process().children(recursive=True)}  # left by earlier tests
    for program in ("print(1)", "while True: pass", "import os\nwhile True: os.fork()"):
        run(program, limits=Limits(wall_s=0.5))
    assert list(tmp_path.iterdir()) == []
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_program_dies_with_the_process_that_runs_it() -> None:
    runner = (
        "from megatron_fipo.verifiers.sandbox import *; run_python('while True: pass', limits=Limits(wall_s=600.0))"
    )
    process = subprocess.Popen([sys.executable, "-c", runner])
    try:
        child = _wait_for(lambda: _protected_child(process.pid))
    finally:
        process.kill()
        process.wait()
    _wait_for(lambda: not _is_running(child))


def _protected_child(pid: int) -> int:
    """The process's first child that has a seccomp filter; 0 if there is none yet."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if "Seccomp:\t2" in Path(f"/proc/{child}/status").read_text():
            return int(child)
    return 0


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _wait_for(condition: Callable[[], int]) -> int:
    deadline = time.monotonic() + 60.0
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_protection_works_without_capabilities() -> None:
    """A user who is not root has no capabilities: only PR_SET_NO_NEW_PRIVS lets such a process install a filter."""
    drop = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
for capability in range(64):
    libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP; fails if the user is not root and has none
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
    program = """
from megatron_fipo.verifiers.sandbox import Limits, check_available, run_python
with open("/proc/self/status") as status:
    assert "CapEff:\\t0000000000000000" in status.read()
check_available()
limits = Limits(wall_s=30.0)
assert run_python("print(6 * 7)", limits=limits).stdout == b"42\\n"
for escape in ("import os; os.fork()", "import socket; socket.socket()", "import os; os.kill(os.getppid(), 0)"):
    assert not run_python(escape, limits=limits).passed, escape
print("protected")
"""
    result = subprocess.run(
        [sys.executable, "-c", drop, program], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.stdout.strip() == "protected", result.stderr


# ------------------------------------------------------------------------------------------- where it is not available


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.check_available.cache_clear()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    job = VerifierJob("code", "def add(a, b): return a + b", SUM)
    for refused in (verify.check_ready, lambda: verify.judge(job, 60.0)):
        with pytest.raises(
            SandboxUnavailableError, match="only by Linux on x86_64 and aarch64, and this is Linux on riscv64"
        ):
            refused()
    # Programs run without protection only if code_unprotected is named.
    verify_unprotected.check_ready()
    assert verify_unprotected.judge(VerifierJob("code_unprotected", job.response_text, SUM), 60.0).correct


def test_a_kernel_that_refuses_the_filter_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "syscall_filter", lambda: b"\0" * 8)  # invalid: a filter must end with a return
    with pytest.raises(SandboxUnavailableError, match=r"unprotected: .*seccomp"):
        run("print('it ran')")


def test_every_processor_s_filter_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    import struct

    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        program = syscall_filter.syscall_filter()
        steps = list(struct.iter_unpack("=HBBI", program))
        assert len(program) % 8 == 0
        assert steps[-1][0] == 0x06  # a return
        for position, (code, if_true, if_false, _) in enumerate(steps):
            if code & 0x07 == 0x05:
                assert position + 1 + max(if_true, if_false) < len(steps)


# --------------------------------------------------------------------------------------------------------- in the pool


def test_hostile_programs_in_the_pool() -> None:
    right = "def add(a, b): return a + b"
    hostile = [
        "while True: pass",
        "import os\nwhile True: os.fork()",
        "import os\nos.kill(os.getppid(), 9)",
        "x = ' ' * 10**11",
    ]
    jobs = [VerifierJob("code", text, SUM) for program in hostile for text in (program, right)]
    with VerifierPool(num_workers=2, timeout_s=10.0, verifiers=["code"]) as pool:
        verdicts = pool.judge_all(jobs)
    assert [verdict.correct for verdict in verdicts] == [False, True] * len(hostile)
    assert [verdict.error for verdict in verdicts] == [""] * len(jobs)


def test_time_is_shared_by_the_tests_of_a_response() -> None:
    slow = {"inputs": ["1\n"] * 50, "outputs": ["1"] * 50}
    program = "import time\nprint(input(), flush=True)\ntime.sleep(0.5)"
    assert not judge(program, slow, timeout_s=2.0).correct
    assert judge(program, {"inputs": ["1\n"], "outputs": ["1"]}).correct
