"""Code: the response's Python program is run in the `sandbox` and must do what the problem's reference asks.

`code_blocks` finds the program in a response, `code_reference` reads references, `code_output` compares results;
docs/programs.md describes all of it for users.

A response is wrong if one test, input or call fails, or if it reaches a limit. All tests of a response together have
`WALL_SHARE` of the verifier's time-out. Programs may use the standard library only, and write no files.

`code` refuses to run anything where the protection is not available; `code_unprotected` runs programs without it, with
all rights of the user who trains, and is meant for machines that are themselves a sandbox.
"""

from __future__ import annotations

import time

from megatron_fipo.verifiers.code_blocks import extract_program
from megatron_fipo.verifiers.code_output import same_output, same_result
from megatron_fipo.verifiers.code_reference import CodeReference, read_reference
from megatron_fipo.verifiers.sandbox import Limits, call_python, check_available, run_python
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict, VerifierJob

WALL_SHARE = 0.8
"""Share of the verifier's time-out that all tests of one response together may take."""

MAX_PROGRAM_CHARACTERS = 50_000
"""Longest program; longer ones are wrong."""

_OUTPUT_BYTES = 2**20
"""Largest output of a program, unless twice the expected output is more."""


class CodeVerifier(JobVerifier):
    """Runs the response's program against its reference."""

    def __init__(self, protected: bool) -> None:
        self._protected = protected

    def check_ready(self) -> None:
        """Check that programs can be confined here; without protection, do nothing.

        Raises:
            SandboxUnavailableError: if they cannot.
        """
        if self._protected:
            check_available()

    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Accept a program that passes everything; the verdict's answer is the program.

        Raises:
            ValueError: for a malformed reference.
            SandboxUnavailableError: if programs cannot be confined here.
        """
        deadline = time.monotonic() + WALL_SHARE * timeout_s
        reference = read_reference(job.reference)
        program = extract_program(job.response_text, reference.asked_names(), bool(reference.outputs), reference.prompt)
        if not program.strip() or len(program) > MAX_PROGRAM_CHARACTERS:
            return Verdict(0.0)
        passes = self._passes_tests if reference.tests else self._returns if reference.function else self._prints
        return Verdict(float(passes(program, reference, deadline)), program)

    def _passes_tests(self, program: str, reference: CodeReference, deadline: float) -> bool:
        return run_python(
            program,
            limits=_limits(deadline),
            tests=reference.tests,
            prompt=reference.prompt,
            entry_point=reference.entry_point,
            same_process=reference.same_process,
            protected=self._protected,
        ).passed

    def _returns(self, program: str, reference: CodeReference, deadline: float) -> bool:
        expected = sum(len(repr(result)) for result in reference.results)
        outcome = call_python(
            program, reference.function, reference.calls, limits=_limits(deadline, expected), protected=self._protected
        )
        return outcome.passed and all(
            any(same_result(returned, result, reference.tolerance) for result in results)
            for returned, results in zip(outcome.results, reference.results, strict=True)
        )

    def _prints(self, program: str, reference: CodeReference, deadline: float) -> bool:
        for stdin, expected in zip(reference.inputs, reference.outputs, strict=True):
            limits = _limits(deadline, len(expected.encode("utf-8", "replace")))
            if limits.wall_s <= 0:
                return False
            outcome = run_python(program, limits=limits, stdin=stdin, judges_imports=True, protected=self._protected)
            printed = outcome.stdout.decode("utf-8", "replace")
            if not outcome.passed or not same_output(printed, expected, reference.tolerance):
                return False
        return True


def _limits(deadline: float, expected_bytes: int = 0) -> Limits:
    return Limits(wall_s=deadline - time.monotonic(), output_bytes=max(_OUTPUT_BYTES, 2 * expected_bytes))


verify = CodeVerifier(protected=True)
verify_unprotected = CodeVerifier(protected=False)
