"""Ask one verifier about one response; whatever it does becomes a verdict of plain data."""

from __future__ import annotations

import traceback

from megatron_fipo.verifiers.returned import NoVerdictError, as_verdict
from megatron_fipo.verifiers.verdict import NO_VERDICT, RAISED, JobVerifier, Verdict, Verifier, VerifierJob


def ask(name: str, verifier: Verifier, job: VerifierJob, timeout_s: float) -> Verdict:
    """Return the verifier's verdict; an exception or a value that is no verdict becomes a verdict with an error.

    Args:
        name: the verifier's name in messages.
        verifier: the verifier.
        job: the response.
        timeout_s: passed on to a `JobVerifier`; nothing is timed here.
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
    """Convert a verdict's fields to plain types: the pool's process may lack the modules of a verifier's own types."""
    return Verdict(
        float(verdict.score),
        writable(str(verdict.answer)),
        writable(str(verdict.error)),
        {writable(str(part)): float(value) for part, value in verdict.parts.items()},
        str(verdict.fault),
    )


def writable(text: str) -> str:
    r"""Write out lone surrogates, which UTF-8 cannot encode, as in \ud800, so that the text can go into files."""
    return text.encode("utf-8", "backslashreplace").decode()
