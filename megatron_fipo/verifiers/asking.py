"""One verifier asked about one response: whatever it does comes back as a verdict of plain data."""

from __future__ import annotations

import traceback

from megatron_fipo.verifiers.returned import NoVerdictError, as_verdict
from megatron_fipo.verifiers.verdict import NO_VERDICT, RAISED, JobVerifier, Verdict, Verifier, VerifierJob


def ask(name: str, verifier: Verifier, job: VerifierJob, timeout_s: float) -> Verdict:
    """The verifier's verdict; what it raises, and what it returns that is no verdict, becomes one with an error.

    Args:
        name: how the verifier is called in messages.
    """
    try:
        if isinstance(verifier, JobVerifier):
            return _plain(as_verdict(verifier.judge(job, timeout_s)))
        return _plain(as_verdict(verifier(job.response_text, job.reference, job.finish_reason)))
    except NoVerdictError as error:
        return Verdict(0.0, error=writable(f"verifier {name} {error}"), fault=NO_VERDICT)
    except Exception as error:  # noqa: BLE001 - a verifier may raise anything; the verdict carries it to the run's report
        last_frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last_frame.filename}:{last_frame.lineno}"
        text = f"verifier {name} raised {type(error).__name__}: {error} ({place})"
        return Verdict(0.0, error=writable(text), fault=RAISED)


def _plain(verdict: Verdict) -> Verdict:
    """With plain types only: the pool's process may lack the modules of whatever a verifier put in there."""
    return Verdict(
        float(verdict.score),
        writable(str(verdict.answer)),
        writable(str(verdict.error)),
        {writable(str(part)): float(value) for part, value in verdict.parts.items()},
        str(verdict.fault),
    )


def writable(text: str) -> str:
    r"""The text with what UTF-8 cannot express, half of a surrogate pair, written as \ud800: it goes into files."""
    return text.encode("utf-8", "backslashreplace").decode()
