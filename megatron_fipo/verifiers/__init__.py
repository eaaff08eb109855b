"""Verifiers, which judge responses, and the pool of processes that runs them. Nothing here imports torch."""
