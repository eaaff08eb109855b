"""What a policy can do: scores of judged responses, evaluation in a run and of a folder, and a conversation."""

from megatron_fipo.evaluation.scores import cons_at_k

__all__ = ["cons_at_k"]
