"""Judges one job in a worker: loads its verifier and asks it."""

from __future__ import annotations

from megatron_fipo.verifiers.asking import ask, writable
from megatron_fipo.verifiers.registry import load_verifier, shown_name
from megatron_fipo.verifiers.verdict import NO_VERDICT, Verdict, VerifierJob


def judge(job: VerifierJob, timeout_s: float) -> Verdict:
    """Run one job's verifier.

    The verdict has an error if the verifier cannot be imported, raises (MemoryError included) or returns no verdict.
    """
    name = shown_name(job.verifier)
    try:
        verifier = load_verifier(job.verifier)
    except Exception as error:  # noqa: BLE001 - a module may raise anything when it is imported
        text = f"verifier {name} could not be loaded: {type(error).__name__}: {error}"
        return Verdict(0.0, error=writable(text), fault=NO_VERDICT)
    return ask(name, verifier, job, timeout_s)
