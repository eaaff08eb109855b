"""Code: the response's Python does what the problem's reference asks, run under `sandbox`'s protection.

`code_blocks` says which part of a response is its program, `code_reference` which references there are, `code_output`
what counts as equal; docs/programs.md tells it all to users.

One test, input or call that fails makes the response wrong, and so does reaching a limit. All of a response share the
verifier's time-out, of which `WALL_SHARE` is theirs. Programs may use the standard library only, and write no files.

`code` refuses to run anything where the protection cannot be had; `code_unprotected` runs programs without it, with
the rights of the user who trains: for machines that are themselves a sandbox.
"""

from __future__ import annotations

import time

from megatron_fipo.verifiers.code_blocks import extract_program
from megatron_fipo.verifiers.code_output import same_output, same_result
from megatron_fipo.verifiers.code_reference import CodeReference, read_reference
from megatron_fipo.verifiers.sandbox import Limits, call_python, check_available, run_python
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict, VerifierJob

WALL_SHARE = 0.8
"""Share of the verifier's time-out that the tests of one response have."""

MAX_PROGRAM_CHARACTERS = 50_000
"""Longer programs are wrong."""

_OUTPUT_BYTES = 2**20
"""Every program may write this much; twice the expected output where that is more."""


class CodeVerifier(JobVerifier):
    """Runs the response's program against its reference."""

    def __init__(self, protected: bool) -> None:
        self._protected = protected

    def check_ready(self) -> None:
        """
        Raises:
            SandboxUnavailableError: where this machine cannot be protected from programs.
        """
        if self._protected:
            check_available()

    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Accept a program that passes everything; the answer is the program.

        Raises:
            ValueError: for a malformed reference.
            SandboxUnavailableError: where programs cannot be protected against.
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
