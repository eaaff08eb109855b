"""The former place of `megatron_fipo.verifiers.registry`."""

from megatron_fipo.verifiers.registry import load_verifier

__all__ = ["load_verifier"]
