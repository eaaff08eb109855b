"""One job to one verdict, whatever the verifier does; a worker calls it."""

from __future__ import annotations

import traceback

from megatron_fipo.rl.verifiers.registry import load_verifier
from megatron_fipo.rl.verifiers.verdict import JobVerifier, Verdict, VerifierJob


def judge(job: VerifierJob, timeout_s: float) -> Verdict:
    """Run one job's verifier; whatever it raises becomes a verdict with an error.

    A verifier that cannot be imported, returns something else than a Verdict, or runs out of memory is an error too.
    """
    try:
        verifier = load_verifier(job.verifier)
        if isinstance(verifier, JobVerifier):
            verdict = verifier.judge(job, timeout_s)
        else:
            verdict = verifier(job.response_text, job.reference, job.finish_reason)
    except Exception as error:  # noqa: BLE001 - a verifier may raise anything; the verdict carries it to the run's report
        last_frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last_frame.filename}:{last_frame.lineno}"
        return Verdict(0.0, error=f"verifier {job.verifier} raised {type(error).__name__}: {error} ({place})")
    if not isinstance(verdict, Verdict):
        return Verdict(0.0, error=f"verifier {job.verifier} returned a {type(verdict).__name__}, not a Verdict")
    # Plain types only: the pool's process may lack the modules of whatever a verifier put in here.
    return Verdict(float(verdict.score), str(verdict.answer), str(verdict.error))
