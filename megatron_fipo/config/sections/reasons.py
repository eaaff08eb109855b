"""Reasons that several keys have in common."""

ORDER_OF_PROMPTS = "it decides the order of the prompts, in which the checkpoint holds a place"
"""Why a run that continues from a checkpoint keeps the value of a data source's key."""
OPTIMIZER_STATE = "the optimizer's state is laid out for the other"
"""Why it keeps the value of a key of the model or the optimizer."""
WHOLE_DISTRIBUTION = "1 samples from the whole distribution"
