"""Traces of a run: chosen groups of some steps, with all that the objective made of each of their tokens.

Rank 0 chooses; who holds a response tells its text and verdict; who trains on it notes its tokens in its update; rank 0
puts them together and writes a file after each such update. Nothing is gathered of what is not chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megatron_fipo.config import Config
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import on_leader
from megatron_fipo.parallel.batch import Division
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.parallel.traced_tokens import TokenTracer, TracedTokens, TraceRoute
from megatron_fipo.rl.packing import split_minibatches
from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.source import StepRollouts
from megatron_fipo.run.sample_choice import shown_reference
from megatron_fipo.run.trace_choice import choose_groups
from megatron_fipo.traces.files import write_trace
from megatron_fipo.traces.schema import (
    ENVIRONMENT,
    IN_LOSS,
    NO_VERSION,
    ROLLOUT_CORRECTION,
    SEQUENCE_FILTER,
    TOO_STALE,
    TRUNCATED,
    TracedResponse,
)
from megatron_fipo.traces.texts import TokenTexts


@dataclass(frozen=True)
class Chosen:
    """A response that is traced, as rank 0 tells the others of it."""

    index: int
    """Place in the step's batch."""
    leader: int
    """The rank that holds it, counted among those that generate."""
    prompt_id: int
    sample_index: int
    first: int
    """Position of the token that predicts its first one."""
    num_tokens: int
    reward: float
    advantage: float


@dataclass(frozen=True)
class Told:
    """What the rank that holds a response tells of it."""

    source: str
    prompt: str
    reference: str
    created_at_step: int
    texts: list[str]
    trajectory: Trajectory


class Tracing:
    """Decides which steps are traced. Making it, and `begin`, are collective over all ranks."""

    def __init__(
        self,
        config: Config,
        ranks: ParallelGroups,
        plane: DataPlane,
        decode: Callable[[list[int]], str],
        token_texts: TokenTexts,
        folder: Path,
    ) -> None:
        """
        Args:
            decode: text of a response's tokens.
            token_texts: texts of its tokens, one by one.
            folder: where files are written.
        """
        self.config, self.ranks, self.plane, self.folder = config, ranks, plane, folder
        self.decode, self.token_texts = decode, token_texts
        self.route = TraceRoute(ranks)

    def is_due(self, step: int) -> bool:
        """Whether a step is traced: the first, every metrics.trace_every_num_steps after it, and the last."""
        every = self.config.metrics.trace_every_num_steps
        return bool(every) and (step % every == 0 or step == self.config.train.num_steps - 1)

    def begin(self, step: int, rollouts: StepRollouts, division: Division) -> StepTrace | None:
        """Choose what is traced of a step; None where it is not due, or has nothing to choose from."""
        if not self.is_due(step):
            return None
        chosen = exchange.broadcast_object(self._choice(step, rollouts), self.ranks.world)
        own = [one for one in chosen if one.leader == self.plane.leader]
        told = self.plane.gathered([(one.index, self._told(one, rollouts.held)) for one in own])
        return StepTrace(self, step, chosen, dict(told), division) if chosen else None

    def _choice(self, step: int, rollouts: StepRollouts) -> list[Chosen] | None:
        """The chosen responses, on rank 0."""
        if rollouts.judged is None:
            return None
        config, groups = self.config, rollouts.judged.trained_on
        section, first = config.metrics, split_minibatches(len(groups), config.train.num_minibatches)[0]
        places = choose_groups(
            groups,
            len(first) if config.train.num_epochs == 1 else 0,
            section.num_traced_groups,
            section.max_traced_tokens,
            config.run.seed,
            step,
        )
        starts = np.cumsum([0, *rollouts.group_sizes]).tolist()
        found = []
        for place in places:
            group = groups[place]
            assert group.rewards is not None, "a step's groups have rewards and advantages"
            assert group.advantages is not None, "a step's groups have rewards and advantages"
            for offset, row in enumerate(group.rows):
                found.append(
                    Chosen(
                        index=starts[place] + offset,
                        leader=int(row["leader"]),
                        prompt_id=int(row["prompt_id"]),
                        sample_index=int(row["sample_index"]),
                        first=int(row["num_prompt_tokens"]) - 1,
                        num_tokens=int(row["num_tokens"]),
                        reward=float(group.rewards[offset]),
                        advantage=float(group.advantages[offset]),
                    )
                )
        return found

    def _told(self, one: Chosen, held: Held) -> Told:
        prompt, trajectory = held.prompts[one.prompt_id], held.samples[one.prompt_id, one.sample_index]
        ids = trajectory.response_ids.tolist()
        whole = replace(trajectory, response_text=trajectory.response_text or self.decode(ids))
        created_at = held.created_at_step[one.prompt_id]
        return Told(prompt.source, prompt.text, shown_reference(prompt), created_at, self.token_texts(ids), whole)


class StepTrace:
    """The trace of one step, update by update."""

    def __init__(
        self, tracing: Tracing, step: int, chosen: Sequence[Chosen], told: Mapping[int, Told], division: Division
    ) -> None:
        """
        Args:
            told: of all chosen responses, by index, on rank 0.
        """
        self._tracing, self._step, self._told = tracing, step, told
        self._chosen = {one.index: one for one in chosen}
        self._minibatches = division.minibatches
        self._tracer: TokenTracer | None = None

    def watching(self, objective: Objective, update: int) -> Objective:
        """The objective of an update, which notes the chosen tokens where any are in its minibatch. Local."""
        here = self._indices_of(update)
        self._tracer = None
        if not here:
            return objective
        places = {index: (self._chosen[index].first, self._chosen[index].num_tokens) for index in here}
        self._tracer = TokenTracer(places, objective.config, notes=self._tracing.ranks.reports_loss)
        return replace(objective, watch=self._tracer)

    def write(self, update: int, num_updates: int) -> None:
        """Write what an update made of the chosen responses in its minibatch, if any. Collective.

        Raises:
            DiskError: on every rank, if it cannot be written.
        """
        if self._tracer is None:
            return
        tracing = self._tracing
        here = self._indices_of(update)
        tokens = tracing.route.at_rank_0(self._tracer, set(here.values()))

        def put_down() -> None:
            responses = [self._response(index, tokens[index], update, num_updates) for index in sorted(here)]
            write_trace(tracing.folder, responses, asdict(tracing.config.objective))

        on_leader(put_down, tracing.ranks.world)
        self._tracer = None

    def _indices_of(self, update: int) -> dict[int, int]:
        """The chosen responses of an update's minibatch, each with the data-parallel rank that trains on it."""
        shares = self._minibatches[update % len(self._minibatches)]
        return {
            index: dp_rank
            for dp_rank, share in enumerate(shares)
            for indices, _ in share
            for index in indices
            if index in self._chosen
        }

    def _response(self, index: int, tokens: TracedTokens, update: int, num_updates: int) -> TracedResponse:
        chosen, told = self._chosen[index], self._told[index]
        trajectory, config = told.trajectory, self._tracing.config
        assert tokens.positions.tolist() == list(range(chosen.first, chosen.first + trajectory.num_response_tokens))
        reasons = _reasons(trajectory, tokens, config)
        of_policy = [reason for reason, own in zip(reasons, trajectory.policy_mask.tolist(), strict=True) if own]
        lengths = [len(segment.token_ids) for segment in trajectory.segments]
        versions = [segment.policy_version for segment in trajectory.segments]
        return TracedResponse(
            step=self._step,
            update=update,
            num_updates=num_updates,
            source=told.source,
            prompt_id=chosen.prompt_id,
            sample_index=chosen.sample_index,
            created_at_step=told.created_at_step,
            prompt=told.prompt,
            response=trajectory.response_text,
            reference=told.reference,
            answer=trajectory.answer,
            score=float(trajectory.accuracy),
            reward=chosen.reward,
            advantage=chosen.advantage,
            finish_reason=trajectory.finish_reason,
            error=trajectory.error,
            left_out=_reason_of_all(of_policy),
            token_ids=trajectory.response_ids.numpy().astype(np.int32),
            texts=told.texts,
            segments=np.repeat(np.arange(len(lengths)), lengths).astype(np.int16),
            policy_versions=np.repeat([NO_VERSION if v is None else v for v in versions], lengths).astype(np.int32),
            rollout_log_probs=trajectory.rollout_log_probs.float().numpy(),
            old_log_probs=tokens.old_log_probs,
            log_probs=tokens.log_probs,
            log_prob_shifts=tokens.log_prob_shifts,
            participates=tokens.participates,
            future_kl=tokens.future_kl,
            influence_weights=tokens.influence_weights,
            token_losses=tokens.token_losses,
            correction_weights=tokens.correction_weights,
            entropies=tokens.entropies,
            left_out_tokens=reasons,
        )


def _reasons(trajectory: Trajectory, tokens: TracedTokens, config: Config) -> list[str]:
    """Why each token is not in the loss; empty where it is."""
    wrote = trajectory.policy_mask.numpy()
    reasons = np.full(len(wrote), IN_LOSS, dtype=object)
    reasons[tokens.response_mask & ~tokens.final_mask] = ROLLOUT_CORRECTION
    reasons[tokens.response_mask & ~tokens.passes_filter] = SEQUENCE_FILTER
    reasons[~tokens.response_mask] = TOO_STALE
    if config.reward.mask_truncated and trajectory.truncated:
        reasons[:] = TRUNCATED
    reasons[~wrote] = ENVIRONMENT
    return [str(reason) for reason in reasons]


def _reason_of_all(reasons: Sequence[str]) -> str:
    """Why a whole response is not in the loss, by its tokens': where these have several, what holds for most of them.

    Empty where a token is in the loss, or there is none.
    """
    if not reasons or IN_LOSS in reasons:
        return IN_LOSS
    return Counter(reasons).most_common(1)[0][0]
