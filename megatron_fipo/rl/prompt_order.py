"""When a step that streams has its batch: full in the order of the prompts, never in that of completion.

Responses finish in any order, short ones first. A batch of the first groups to finish would teach brevity. So a group
counts only when all responses to all prompts before it are judged, too: the batch is then the first groups with a
signal in the order of the prompts, for any number of servers and any order of completion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron_fipo.config import num_groups_ahead, num_groups_to_begin
from megatron_fipo.rl.judged_group import JudgedGroup, joined

_MEMORY = 0.5
"""Weight of what was known of the share that is kept, beside the next step's groups."""


@dataclass(frozen=True)
class KeptShare:
    """What earlier steps say of the share of groups that are kept. Counts, of which older steps' weigh less."""

    kept: float = 0.0
    used: float = 0.0

    def after(self, num_kept: int, num_used: int) -> KeptShare:
        """What is known after another step."""
        return KeptShare(_MEMORY * self.kept + num_kept, _MEMORY * self.used + num_used)

    def share(self, num_kept: int = 0, num_judged: int = 0) -> float:
        """The share to expect, with what a step has judged so far; 1 while nothing is known."""
        used = self.used + num_judged
        return 1.0 if not used else max(self.kept + num_kept, 0.5) / used


class FreshSamples:
    """The samples of prompts that a step may begin, in order: those that no step before it has begun.

    Args:
        first_prompt: the first prompt that is not used up.
        num_samples: samples of each prompt.
        begun: (prompt_id, sample_index) of those that are begun.
    """

    def __init__(self, first_prompt: int, num_samples: int, begun: Collection[tuple[int, int]]) -> None:
        self._first_prompt, self._num_samples, self._begun = first_prompt, num_samples, begun
        self._samples: list[tuple[int, int]] = []
        self._ends: list[int] = []
        """How many there are of the first prompt, of the first two, and so on, as far as anybody has asked."""

    def num_until(self, num_prompts: int) -> int:
        """How many there are of the first prompts."""
        self._look_at(num_prompts)
        return self._ends[num_prompts - 1] if num_prompts else 0

    def at(self, place: int) -> tuple[int, int]:
        """(prompt_id, sample_index) of one of them."""
        while place >= len(self._samples):
            self._look_at(len(self._ends) + 1)
        return self._samples[place]

    def _look_at(self, num_prompts: int) -> None:
        for prompt_id in range(self._first_prompt + len(self._ends), self._first_prompt + num_prompts):
            of_prompt = ((prompt_id, index) for index in range(self._num_samples))
            self._samples += [sample for sample in of_prompt if sample not in self._begun]
            self._ends.append(len(self._samples))


class PromptOrderBooks:
    """What is judged of one step's prompts. Rank 0 keeps it.

    Args:
        prompts: ids of the prompts that the step may use, in order, each one more than the one before.
        num_samples: responses to each prompt.
        num_groups: groups that fill the batch.
        is_kept: whether a judged group is trained on, such as `DynamicSampler.is_kept`.
        known: what earlier steps say of the share that is.
        num_steps_ahead: steps by which prompts may be begun before the step that trains on them.
        is_adaptive: whether `num_to_begin` follows what is judged while others are still in flight. It then depends on
            which responses end first; the batch never does.
    """

    def __init__(
        self,
        prompts: range,
        num_samples: int,
        num_groups: int,
        is_kept: Callable[[JudgedGroup], bool],
        known: KeptShare = KeptShare(),
        *,
        num_steps_ahead: int = 0,
        is_adaptive: bool = True,
    ) -> None:
        self._known, self._is_adaptive = known, is_adaptive
        self._prompts, self._num_samples, self._num_groups, self._is_kept = prompts, num_samples, num_groups, is_kept
        self._parts: dict[int, list[JudgedGroup]] = {}
        self._whole: dict[int, JudgedGroup] = {}
        self._next = prompts.start
        self._num_kept = 0
        self._num_kept_anywhere = 0
        self.num_to_begin = min(num_groups_to_begin(num_groups, known.share()), len(prompts))
        """Prompts, from the first on, whose responses may be begun: others would most likely not be used, or too late.
        """
        if num_steps_ahead:
            self.look_ahead(num_steps_ahead)

    def look_ahead(self, num_steps: int) -> None:
        """Let prompts be begun so many steps before the one that trains on them.

        What is begun ahead is not needed now. So the few groups that a step judges first do not move its number.
        """
        ahead = num_groups_ahead(self._num_groups, self._known.share(), num_steps)
        self.num_to_begin = min(max(self.num_to_begin, ahead), len(self._prompts))

    def add(self, part: JudgedGroup) -> None:
        """Enter one or more responses to one prompt.

        Raises:
            ValueError: if there is one response too many: something was generated twice.
        """
        prompt_id = part.prompt_id
        parts = self._parts.setdefault(prompt_id, [])
        parts.append(part)
        indices = [index for one in parts for index in one.rows["sample_index"].tolist()]
        if len({*indices}) != len(indices) or prompt_id not in self._prompts or prompt_id in self._whole:
            raise ValueError(
                f"prompt {prompt_id} has responses {sorted(indices)}; of each of the step's prompts {self._prompts} "
                f"there are {self._num_samples}, each of them once"
            )
        if len(indices) == self._num_samples:
            self._whole[prompt_id] = joined(parts)
            del self._parts[prompt_id]
            self._num_kept_anywhere += self._is_kept(self._whole[prompt_id])
            self._advance()
            self._allow_more()

    def _advance(self) -> None:
        """Go past the prompts that are judged whole, as far as the batch needs any."""
        while not self.is_over and self._next in self._whole:
            self._num_kept += self._is_kept(self._whole[self._next])
            self._next += 1

    def _allow_more(self) -> None:
        num_judged = len(self._whole)
        if self.is_over or not (self._is_adaptive or num_judged == self.num_to_begin):
            return
        share = self._known.share(self._num_kept_anywhere, num_judged)
        needed = num_judged + num_groups_to_begin(self._num_groups - self._num_kept_anywhere, share)
        self.num_to_begin = min(max(self.num_to_begin, needed), len(self._prompts))

    @property
    def is_over(self) -> bool:
        """Whether nothing more is needed: the batch is full, or no prompt is left."""
        return self._num_kept >= self._num_groups or self._next == self._prompts.stop

    @property
    def next_prompt(self) -> int:
        """The first prompt that is not used up; the next step goes on from it."""
        return self._next

    def groups(self) -> list[JudgedGroup]:
        """The groups of all prompts that are used up, in order, those without a signal among them."""
        return [self._whole[prompt_id] for prompt_id in range(self._prompts.start, self._next)]

    @property
    def num_tokens_beyond(self) -> int:
        """Tokens of judged responses that nobody uses: to prompts after those."""
        beyond = [group for prompt_id, group in self._whole.items() if prompt_id >= self._next]
        beyond += [part for parts in self._parts.values() for part in parts]
        return sum(int(group.rows["num_tokens"].sum()) for group in beyond)
