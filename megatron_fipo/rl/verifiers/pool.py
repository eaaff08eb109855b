"""The former place of `megatron_fipo.verifiers.pool`."""

from megatron_fipo.verifiers.pool import VerifierPool

__all__ = ["VerifierPool"]
