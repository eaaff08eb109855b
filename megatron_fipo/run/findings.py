"""What is found out about a run's verifiers before it begins, brought to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_fipo.data.prompts import PromptStream
from megatron_fipo.environments.verifier_probes import first_held_out
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.verifiers.check import Findings


def first_prompts(stream: PromptStream, held_out: Mapping[str, Sequence[Prompt]]) -> dict[str, Prompt]:
    """The first prompt of each source, by the source's key in the configuration."""
    training = {f"data.train.{name}": prompt for name, prompt in stream.first_prompts().items()}
    return training | first_held_out(held_out)


def told_by_leader(look: Callable[[], Findings], ranks: ParallelGroups) -> Findings:
    """What the leader finds, on every rank. Collective; a problem that it finds is raised everywhere."""
    own = look() if ranks.rank == 0 else Findings()
    findings = exchange.all_gather_objects(own, ranks.world)[0]
    findings.raise_problems()
    return findings


def told_by_all(own: Findings, ranks: ParallelGroups) -> tuple[str, ...]:
    """The warnings of all ranks, each once. Collective; a problem that one of them finds is raised everywhere."""
    found = exchange.all_gather_objects(own, ranks.world)
    for findings in found:
        findings.raise_problems()
    return tuple(dict.fromkeys(warning for findings in found for warning in findings.warnings))
