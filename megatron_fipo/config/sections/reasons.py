"""Reasons that several keys have in common."""

ORDER_OF_PROMPTS = "it decides the order of the prompts, in which the checkpoint holds a place"
"""Why a run that goes on from a checkpoint keeps a key's value."""
OPTIMIZER_STATE = "the optimizer's state is laid out for the other"
"""The same, of keys of the model and the optimizer."""
WHOLE_DISTRIBUTION = "1 samples from the whole distribution"
