"""Code: the response's Python passes the problem's tests, run under `sandbox`'s protection.

The program is the last complete block between fences (```python … ```), else what follows a fence that was never
closed, else the whole response. References come in two styles, as mappings or as their JSON text:

- tests={"tests": "assert f(1) == 2", "prompt": "def f(x):\\n", "entry_point": "f"}, as of HumanEval and MBPP. The tests
  may be a list of statements. The optional prompt is put in front of the program, which may complete it or start anew;
  with an entry_point, the tests define check(candidate), which is called with it.
- inputs and outputs, lists of texts: the program is run on each input and its standard output compared line by line,
  white space at the ends of lines and of the whole aside.

One test that fails makes the response wrong, and so does reaching a limit. All tests of a response share the verifier's
time-out, of which `WALL_SHARE` is theirs. Programs may use the standard library only, and can write no files.

`code` refuses to run anything where the protection cannot be had; `code_unprotected` runs programs without it, with
the rights of the user who trains: for machines that are themselves a sandbox.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_fipo.rl.verifiers.sandbox import Limits, check_available, run_python
from megatron_fipo.rl.verifiers.verdict import JobVerifier, Verdict, VerifierJob

WALL_SHARE = 0.8
"""Share of the verifier's time-out that the tests of one response have."""

MAX_PROGRAM_CHARACTERS = 50_000
"""Longer programs are wrong."""

_SEARCHED_CHARACTERS = 200_000
_FENCE = re.compile(r"^([ \t]*)```[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)


def extract_program(response_text: str) -> str:
    """The response's program, moved left by as much as its fence is indented; empty if there is none."""
    text = response_text[-_SEARCHED_CHARACTERS:]
    block: tuple[str, str] | None = None
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is not None:
            block = opening[1], text[opening.end() : fence.start()]
        # A fence that names a language opens a block, also where the one before it was left open.
        opening = fence if opening is None or fence[2] else None
    if block is None:
        block = (opening[1], text[opening.end() :]) if opening is not None else ("", text)
    indentation, program = block
    return "\n".join(line.removeprefix(indentation) for line in program.strip("\n").split("\n"))


@dataclass(frozen=True)
class _Tests:
    """A reference, read: either tests, or inputs with their outputs."""

    prompt: str
    tests: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_reference(reference: Any) -> _Tests:
    """Read a reference of either style.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(reference, str):
        try:
            reference = json.loads(reference)
        except json.JSONDecodeError as error:
            raise ValueError(f"a code reference given as text is JSON, got {reference!r:.100}: {error.msg}") from error
    if isinstance(reference, Mapping):
        tests, inputs, outputs = (reference.get(key) for key in ("tests", "inputs", "outputs"))
        if tests is not None and inputs is None and outputs is None:
            source = tests if isinstance(tests, str) else "\n".join(tests)
            if reference.get("entry_point"):
                source += f"\ncheck({reference['entry_point']})\n"
            if source.strip():
                return _Tests(reference.get("prompt") or "", source, (), ())
        if tests is None and inputs and outputs and len(inputs) == len(outputs):
            return _Tests("", "", tuple(map(str, inputs)), tuple(map(str, outputs)))
    raise ValueError(
        "a code reference has tests (statements, with prompt and entry_point where wanted), or inputs and as many "
        f"outputs; got {reference!r:.200}"
    )


class CodeVerifier(JobVerifier):
    """Runs the response's program against its tests."""

    def __init__(self, protected: bool) -> None:
        self._protected = protected

    def check_ready(self) -> None:
        """Raises SandboxUnavailableError where programs cannot be protected against."""
        if self._protected:
            check_available()

    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Accept a program that passes every test; the answer is the program.

        Raises:
            ValueError: for a malformed reference.
            SandboxUnavailableError: where programs cannot be protected against.
        """
        deadline = time.monotonic() + WALL_SHARE * timeout_s
        tests = read_reference(job.reference)
        program = extract_program(job.response_text)
        if not program.strip() or len(program) > MAX_PROGRAM_CHARACTERS:
            return Verdict(0.0)
        return Verdict(float(self._passes(tests.prompt + program, tests, deadline)), program)

    def _passes(self, program: str, tests: _Tests, deadline: float) -> bool:
        limits = Limits(wall_s=deadline - time.monotonic())
        if tests.tests:
            return run_python(program, limits=limits, tests=tests.tests, protected=self._protected).passed
        for stdin, expected in zip(tests.inputs, tests.outputs, strict=True):
            limits = replace(limits, wall_s=deadline - time.monotonic())
            if limits.wall_s <= 0:
                return False
            outcome = run_python(program, limits=limits, stdin=stdin, protected=self._protected)
            if not outcome.passed or _lines(outcome.stdout.decode("utf-8", "replace")) != _lines(expected):
                return False
        return True


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.strip().splitlines()]


verify = CodeVerifier(protected=True)
verify_unprotected = CodeVerifier(protected=False)
