"""The former place of `megatron_fipo.verifiers.reasoning_gym_tasks`."""

from megatron_fipo.verifiers.reasoning_gym_tasks import open_task

__all__ = ["open_task"]
