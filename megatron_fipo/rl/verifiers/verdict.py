"""The former place of `megatron_fipo.verifiers.verdict`."""

from megatron_fipo.verifiers.verdict import Verdict, VerifierJob

__all__ = ["Verdict", "VerifierJob"]
