"""What a run had spent before each of its steps: tokens trained on, and floating-point operations.

Curves over these compare methods at equal cost. A step's rewards, like an evaluation, are of the policy before the
step's updates, so that the cost of the step itself comes behind them.
"""

from __future__ import annotations

from pathlib import Path

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.preflight.work import forward_flops
from megatron_fipo.report.run_data import RunData
from megatron_fipo.report.written_config import without_credentials

TOKENS = "policy/response_tokens"


def tokens_before(run: RunData) -> list[float | None]:
    """Response tokens that were trained on before each step, counted once in each update that used them."""
    return _before(run, {step: run.metrics.at(TOKENS, step) for step in run.metrics.training_steps})


def flops_before(run: RunData) -> tuple[list[float | None] | None, str]:
    """Operations before each step: generation, old and reference log-probs, forward and backward of the updates.

    They follow from the model's shape and the mean lengths of each step; what is recomputed does not count. Evaluations
    do not either.

    Returns:
        (operations, empty) or (None, why they cannot be told).
    """
    try:
        shape = _shape(run)
    except ValueError as error:
        return None, without_credentials(f"Operations are not known: {error}")  # it names the model's place
    spent = {step: _flops_of_step(run, step, shape) for step in run.metrics.training_steps}
    if None in spent.values():
        missing = next(step for step, flops in spent.items() if flops is None)
        return None, f"Operations are not known: step {missing} has no numbers of groups and lengths."
    return _before(run, spent), ""


def _before(run: RunData, spent: dict[int, float | None]) -> list[float | None]:
    """Sums of what earlier steps have spent, at every step of the table; None from the first unknown one on."""
    total: float | None = 0.0
    sums: list[float | None] = []
    for step in run.metrics.steps:
        sums.append(total)
        if step in spent:
            more = spent[step]
            total = None if total is None or more is None else total + more
    return sums


def _shape(run: RunData) -> ModelShape:
    """The model's shape: of the folder that it was read from, or of what the run has exported."""
    exported = run.folder / "huggingface"
    if (exported / "config.json").is_file():
        return read_model_shape(exported)
    path = Path(str(run.config.get("model.path")))
    if not (path / "config.json").is_file():
        raise ValueError(f"model.path={path} is no folder here with a config.json.")
    return read_model_shape(path)


def _flops_of_step(run: RunData, step: int, shape: ModelShape) -> float | None:
    names = (TOKENS, "perf/tokens", "rollout/batch_groups", "rollout/generated_groups", "rollout/response_tokens/mean")
    values = [run.metrics.at(name, step) for name in names]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known[2]:
        return None
    trained_tokens, tokens, groups, generated_groups, generated_length = known
    samples, epochs = run.number("rollout.num_samples_per_prompt"), run.number("train.num_epochs")
    responses = groups * samples
    length = tokens / responses
    prompt = length - trained_tokens / epochs / responses
    sequence = forward_flops(shape, length)
    passes = (
        (run.config.get("objective.old_log_probs") == "actor")
        + bool(run.config.get("objective.kl_coefficient"))
        + 3 * epochs
    )
    generation = generated_groups * samples * forward_flops(shape, prompt + generated_length)
    return generation + passes * responses * sequence
