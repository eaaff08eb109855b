"""Final answers are found and judged, and the pool survives whatever a verifier does."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import require_verifier_name
from megatron_fipo.verifiers import chain_arithmetic, exact, mathematics
from megatron_fipo.verifiers import pool as pool_module
from megatron_fipo.verifiers.answer_markers import last_answer_line, last_boxed, last_marked_answer
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS
from megatron_fipo.verifiers.pool import MAX_BATCH_SIZE, VerifierPool
from megatron_fipo.verifiers.registry import load_verifier
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.verifiers.worker_process import VerifierUnavailableError

pytestmark = pytest.mark.slow

MISBEHAVIOUR = """
import ctypes, os, sys, time
from megatron_fipo.verifiers.verdict import Verdict

def behave(response_text, reference, finish_reason):
    if response_text == "hang":
        while True:
            pass
    if response_text == "hang in C":
        if reference != "right":
            open(reference, "w").close()
        # Holds the interpreter lock for ever, so that no Python code of the worker can run again.
        ctypes.PyDLL(None).sleep(3600)
    if response_text == "exit":
        os._exit(3)
    if response_text == "sys.exit":
        sys.exit(4)
    if response_text == "segfault":
        ctypes.string_at(0)
    if response_text == "memory":
        return Verdict(float(len(bytearray(3 << 30)) > 0))
    if response_text == "raise":
        raise KeyError("no such thing")
    if response_text == "list":
        return [True]
    if response_text == "score":
        return Verdict(1.5)
    if response_text == "torch":
        return Verdict(float("torch" in sys.modules))
    if response_text == "pid":
        return Verdict(1.0, str(os.getpid()))
    if response_text == "print":
        print("a verifier's print")
    if response_text == "flood":
        print("\\x1b[31mred" * 100_000)
    if response_text == "child":
        child = os.fork()
        if child == 0:
            time.sleep(600)
        return Verdict(1.0, str(child))
    if response_text == "wait":
        while not os.path.exists(reference):
            time.sleep(0.001)
    return Verdict(float(response_text == reference), response_text)
"""
BEHAVE = "misbehaviour:behave"


@pytest.fixture
def misbehaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "misbehaviour.py").write_text(MISBEHAVIOUR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def job(text: str, reference: Any = "right") -> VerifierJob:
    return VerifierJob(BEHAVE, text, reference, "stop")


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int, patience_s: float = 30.0) -> None:
    deadline = time.monotonic() + patience_s
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------- final answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{3} but \boxed{unfinished", "3"),
        ("Answer: 3\nNo.\nanswer: 4", "4"),
        ("**Final Answer:** 12.", "12"),
        ("Answer:\n\n7", "7"),
        ("#### 1,200", "1,200"),
        (r"Answer: 3, that is \boxed{4}", "4"),
        (r"\boxed{4}. Answer: 5", "5"),
        (r"Answer: $\boxed{6}$", "6"),
        ("The answers: none of them", None),
        ("I would say 5", None),
        ("", None),
    ],
)
def test_last_marked_answer(text: str, answer: str | None) -> None:
    assert last_marked_answer(text) == answer


def test_markers_give_positions() -> None:
    assert last_boxed(r"ab\boxed{1}") == (2, "1")
    assert last_answer_line("ab Answer: 1.5.") == (3, "1.5")


@pytest.mark.parametrize(
    ("text", "finish_reason", "score", "answer"),
    [
        ("3+4=7;#7", "stop", 1.0, "7"),
        ("#3;#7", "stop", 1.0, "7"),
        ("#7;#3", "stop", 0.0, "3"),
        ("#07", "stop", 0.0, "07"),
        ("#7", "length", 0.0, ""),
        ("#7;", "stop", 0.0, ""),
        ("#7\n", "stop", 0.0, ""),
        ("7", "stop", 0.0, ""),
    ],
)
def test_chain_arithmetic(text: str, finish_reason: str, score: float, answer: str) -> None:
    assert chain_arithmetic.verify(text, "7", finish_reason) == Verdict(score, answer)


def test_exact() -> None:
    assert exact.verify(" 7\n", 7, "stop") == Verdict(1.0, "7")
    assert exact.verify("7.0", 7, "stop").score == 0.0


@pytest.mark.parametrize(
    ("text", "reference", "correct"),
    [
        ("Answer: 18", "18", True),
        ("Answer: 18", 18, True),
        ("Answer: 18.0", "Natalia sold 18 clips.\n#### 18", True),
        ("#### 70,000", "70000", True),
        ("Answer: $1,200 dollars.", "1200", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"Answer: $\frac{2}{4}$", r"\frac{1}{2}", True),
        (r"Answer: $x^2 + 2x + 1$", r"(x+1)^2", True),
        ("Answer: 19", "18", False),
        ("18", "18", False),
        ("Answer: 18\nAnswer: 19", "18", False),
        ("Answer: 17 or 18", "18", False),
        ("Answer: 18:30", "18", False),
        ("Answer: 2 pi", "2", False),
        ("Answer: no idea", "18", False),
    ],
)
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_math(text: str, reference: Any, correct: bool, finish_reason: str) -> None:
    assert mathematics.verify(text, reference, finish_reason).correct is correct


def test_math_refuses_a_reference_that_is_not_mathematics() -> None:
    with pytest.raises(ValueError, match="cannot be read as mathematics"):
        mathematics.verify("Answer: 1", "", "stop")


def test_reasoning_gym() -> None:
    import reasoning_gym

    verify = load_verifier("reasoning_gym")
    params = {"min_digits": 1, "max_digits": 1}
    entry = reasoning_gym.create_dataset("chain_sum", seed=0, size=1, **params)[0]
    reference = {"task": "chain_sum", "params": params, "entry": entry}
    right = entry["answer"]
    assert verify(f"<answer>0</answer> or <answer>\n{right}\n</answer>", reference, "stop") == Verdict(1.0, right)
    assert verify(f"Answer: {right}.", reference, "length").correct
    assert verify(f"Let me see.\n{right}\n", reference, "stop").correct
    partial = verify(f"It is {right}", reference, "stop")
    assert 0.0 < partial.score < 1.0
    assert not partial.correct
    assert verify("", reference, "stop") == Verdict(0.0)
    with pytest.raises(ValueError, match="task, params and entry"):
        verify(right, right, "stop")


@pytest.mark.parametrize(
    ("task", "seed", "right", "wrong"),
    [
        ("game_of_life_halting", None, ("False", "no", "false."), ("xyzzy", "True", "yes", "0", "[]")),
        ("coin_flip", None, ("0.3125", "5/16"), ("0", "0.3", "3", "0.31", "xyzzy")),
        ("letter_jumble", 0, ("{}",), ("{} and more", "{} {}", "")),
        ("spell_backward", 0, ("{}", "{} "), ("{}x", "{} or not", "x{}")),
        ("gsm_symbolic", 0, ("{}", "{} apples", "${}.0"), ("-{}", "{} or 1", "{} but not 7", "x")),
        ("number_sorting", None, ("['-87.0', '-48.0', '-26.01', '-5.19', '19.0', '81.8']",),
         ("['-87.0', '-48.0', '-26.02', '-5.19', '19.0', '81.8']", "[]")),
        ("puzzle24", None, ("10 + 3 + 4 + 7", "(7+4)+10+3"), ("6*(1 + 6 - 3)", "10 + 3 + 4 * 7", "2**10")),
        ("kakurasu", 0, ("{}",), ("-{}", "4{}", "x")),
        ("complex_arithmetic", 0, ("{}",), ("nan", "nan+nani", "x")),
    ],
)  # fmt: skip
def test_scorers_that_give_full_marks_to_wrong_answers_get_a_second_look(
    task: str, seed: int | None, right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    """Negative control: the package's own scorer accepts the first of the wrong answers."""
    from megatron_fipo.verifiers.reasoning_gym_tasks import open_task

    verify = load_verifier("reasoning_gym")
    entries = (open_task(task, {}, seed=number, size=1)[0] for number in range(400))
    entry = next(entry for entry in entries if seed is not None or str(entry["answer"]) == right[0])
    reference = {"task": task, "params": {}, "entry": entry}
    own = [answer.replace("{}", str(entry["answer"])) for answer in (*right, *wrong)]
    judged = [verify(f"<answer>{answer}</answer>", reference, "stop").correct for answer in own]
    assert judged == [True] * len(right) + [False] * len(wrong)
    assert open_task(task, {}, seed=0, size=1).score_answer(own[len(right)], entry) > 1 - 1e-9


def test_answers_of_tasks_that_compute_by_shifting_bits_are_right() -> None:
    """Some problems of the task contain shifts, which its scorer computes again for every answer."""
    import reasoning_gym

    verify = load_verifier("reasoning_gym")
    entries = list(reasoning_gym.create_dataset("bitwise_arithmetic", seed=0, size=30))
    assert any("<<" in entry["metadata"]["problem"] for entry in entries)
    for entry in entries:
        reference = {"task": "bitwise_arithmetic", "params": {}, "entry": entry}
        assert verify(entry["answer"], reference, "stop").correct, entry["metadata"]["problem"]
        assert not verify(hex(int(entry["answer"], 16) + 1), reference, "stop").correct


def test_a_task_without_one_right_answer_scores_a_malformed_one_zero() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("boxnet", seed=0, size=1)[0]
    assert entry["answer"] is None
    reference = {"task": "boxnet", "params": {}, "entry": entry}
    for answer in ("0", "[[]]", "[0]"):
        assert load_verifier("reasoning_gym")(answer, reference, "stop") == Verdict(0.0, answer)


def test_reasoning_gym_scorer_that_raises_over_a_wrong_answer_scores_zero_and_a_broken_one_raises() -> None:
    import reasoning_gym

    verify = load_verifier("reasoning_gym")
    entry = dict(reasoning_gym.create_dataset("prime_factorization", seed=0, size=1)[0])
    reference = {"task": "prime_factorization", "params": {}, "entry": entry}
    assert verify(entry["answer"], reference, "stop").correct
    assert verify("two times three", reference, "stop") == Verdict(0.0, "two times three")
    entry["answer"] = "neither is this a factorization"
    with pytest.raises(ValueError, match="invalid literal"):
        verify("two times three", reference, "stop")


def test_verdict_refuses_scores_outside_the_unit_interval() -> None:
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            Verdict(score)


def test_unknown_verifier_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean chain_arithmetic"):
        require_verifier_name("chain_aritmetic")
    for name in (*BUILTIN_VERIFIERS, "my.module:verify"):
        require_verifier_name(name)


# ------------------------------------------------------------------------------------------------------------- pool


def test_verdicts_come_in_order_over_several_workers_and_batches() -> None:
    answers = [str(number) for number in range(3 * MAX_BATCH_SIZE + 1)]
    jobs = [VerifierJob("chain_arithmetic", f"#{answer}", "1" if answer == "7" else answer) for answer in answers]
    with VerifierPool(num_workers=2, verifiers=["chain_arithmetic"]) as pool:
        verdicts = pool.judge_all(jobs)
    assert [verdict.answer for verdict in verdicts] == answers
    assert [verdict.correct for verdict in verdicts] == [answer != "7" for answer in answers]


@pytest.mark.usefixtures("misbehaviour")
@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("exit", "ended its process (exit code 3)"),
        ("sys.exit", "ended its process (exit code 4)"),
        ("segfault", "ended its process (signal SIGSEGV)"),
        ("hang", "took longer than verifier.timeout_s=0.5"),
        ("hang in C", "took longer than verifier.timeout_s=0.5"),
        ("memory", "raised MemoryError"),
        ("raise", "raised KeyError: 'no such thing'"),
        ("list", "returned a list ([True]). A verifier judges one response"),
        ("score", "raised ValueError: a verdict's score lies in [0, 1], got 1.5"),
    ],
)
def test_misbehaviour_costs_one_verdict(text: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MEMORY_GIB", 2.0)
    jobs = [job("right"), job("wrong"), job(text), job("right"), job("wrong")]
    with VerifierPool(timeout_s=0.5, verifiers=[BEHAVE]) as pool:
        # Queued together, so that they share a batch with the one that fails.
        verdicts = pool.judge_all(jobs)
        assert pool.judge_all(jobs[:1])[0].correct
    assert [verdict.correct for verdict in verdicts] == [True, False, False, True, False]
    assert [bool(verdict.error) for verdict in verdicts] == [False, False, True, False, False]
    assert error in verdicts[2].error


@pytest.mark.usefixtures("misbehaviour")
def test_nothing_but_misbehaviour_ends_too() -> None:
    with VerifierPool(num_workers=2, timeout_s=0.3, verifiers=[BEHAVE]) as pool:
        verdicts = pool.judge_all([job(text) for text in ("exit", "hang", "segfault", "exit", "raise", "hang")])
    assert all(verdict.error for verdict in verdicts)


@pytest.mark.usefixtures("misbehaviour")
def test_workers_run_without_torch_and_outside_this_process() -> None:
    with VerifierPool(verifiers=[BEHAVE, *BUILTIN_VERIFIERS]) as pool:
        assert pool.judge_all([job("torch")])[0].score == 0.0
        assert pool.judge_all([job("pid")])[0].answer != str(os.getpid())


@pytest.mark.usefixtures("misbehaviour")
def test_results_arrive_while_others_are_being_judged(tmp_path: Path) -> None:
    release = tmp_path / "release"
    with VerifierPool(num_workers=2, timeout_s=60.0, verifiers=[BEHAVE]) as pool:
        slow = pool.submit(job("wait", str(release)))
        assert pool.submit(job("right")).result(timeout=60).correct
        assert not slow.done()
        release.touch()
        assert slow.result(timeout=60).answer == "wait"


@pytest.mark.usefixtures("misbehaviour")
def test_judge_from_an_event_loop() -> None:
    async def judge_three(pool: VerifierPool) -> list[Verdict]:
        return await asyncio.gather(*(pool.judge(job(text)) for text in ("right", "exit", "wrong")))

    with VerifierPool(verifiers=[BEHAVE]) as pool:
        right, died, wrong = asyncio.run(judge_three(pool))
    assert right.correct
    assert "exit code 3" in died.error
    assert not wrong.correct
    assert not wrong.error


@pytest.mark.usefixtures("misbehaviour")
def test_close_ends_the_workers_their_children_and_what_is_pending() -> None:
    pool = VerifierPool(timeout_s=600.0, verifiers=[BEHAVE], trusted=[BEHAVE])  # only a trusted one may fork
    worker = int(pool.judge_all([job("pid")])[0].answer)
    child = int(pool.judge_all([job("child")])[0].answer)
    assert is_running(worker)
    assert is_running(child)
    futures = pool.submit_all([job("hang"), job("right")])
    pool.close()
    pool.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="the verifier pool is closed"):
            future.result(timeout=0)
    with pytest.raises(RuntimeError, match="the verifier pool is closed"):
        pool.submit(job("right"))
    wait_until_gone(worker)
    wait_until_gone(child)


@pytest.mark.usefixtures("misbehaviour")
def test_cancelled_jobs_are_not_judged(tmp_path: Path) -> None:
    release = tmp_path / "release"
    with VerifierPool(timeout_s=60.0, verifiers=[BEHAVE], trusted=[BEHAVE]) as pool:  # one process for all
        blocker = pool.submit(job("wait", str(release)))
        while not blocker.running():
            time.sleep(0.001)
        unwanted = pool.submit(job("exit"))
        assert unwanted.cancel()
        release.touch()
        pid = pool.judge_all([job("pid")])[0].answer
        assert pool.judge_all([job("pid")])[0].answer == pid
    assert unwanted.cancelled()


@pytest.mark.usefixtures("misbehaviour")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:verify", "there is no module '?no_such_module"),
        ("misbehaviour:behav", r"misbehaviour.py has .*behav.*Did you mean '?misbehaviour:behave'?\?"),
    ],
)
def test_verifier_that_cannot_be_used_stops_the_run_in_words(name: str, words: str) -> None:
    with VerifierPool(verifiers=[name]) as pool:
        # A ValueError is the user's mistake: exit code 2, no traceback.
        with pytest.raises(ValueError, match=f"verifier '?{name}.*{words}"):
            pool.judge_all([VerifierJob(name, "", "")])
        with pytest.raises(VerifierUnavailableError, match=words):
            pool.submit(VerifierJob(name, "", ""))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"verifier\.timeout_s is positive, got 0"):
        VerifierPool(timeout_s=0.0)
    with pytest.raises(ValueError, match="verifier=maths: must be one of"):
        VerifierPool(verifiers=["maths"])
    with VerifierPool() as pool, pytest.raises(ValueError, match="verifier=maths: must be one of"):
        pool.submit(VerifierJob("maths", "", ""))


@pytest.mark.usefixtures("misbehaviour")
def test_worker_of_a_killed_run_ends_by_itself(tmp_path: Path) -> None:
    program = """
        from megatron_fipo.verifiers.pool import VerifierPool
        from megatron_fipo.verifiers.verdict import VerifierJob
        name = "misbehaviour:behave"
        pool = VerifierPool(timeout_s=0.5, verifiers=[name], trusted=[name])  # may write its marker
        print(pool.judge_all([VerifierJob("misbehaviour:behave", "pid", "")])[0].answer, flush=True)
        pool.submit(VerifierJob("misbehaviour:behave", "hang in C", "hanging"))
        import os, signal
        while not os.path.exists("hanging"): pass
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], os.getcwd()])}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    wait_until_gone(int(run.stdout))


@pytest.mark.usefixtures("misbehaviour")
def test_prints_of_a_verifier_stay_off_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with VerifierPool(verifiers=[BEHAVE]) as pool:
        pool.judge_all([job("print")])
        assert pool.judge_all([job("flood")])[0].error == ""
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "a verifier's print" in captured.err
    assert r"\x1b[31mred" in captured.err
    assert len(captured.err) < 10_000
