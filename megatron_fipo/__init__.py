"""Reinforcement learning that teaches language models to reason, on Megatron-Core."""

__version__ = "0.1.0"
