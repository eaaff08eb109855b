"""What a policy can do: scores of judged responses, evaluation in a run and of a folder, and a conversation."""
