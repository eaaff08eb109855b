"""When a step that streams has its batch: full in the order of the prompts, never in that of completion.

Responses finish in any order, short ones first. A batch of the first groups to finish would teach brevity. So a group
counts only when all responses to all prompts before it are judged, too: the batch is then the first groups with a
signal in the order of the prompts, for any number of servers and any order of completion.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_fipo.rl.judged_group import JudgedGroup, joined


class PromptOrderBooks:
    """What is judged of one step's prompts. Rank 0 keeps it.

    Args:
        prompts: ids of the prompts that the step may use, in order, each one more than the one before.
        num_samples: responses to each prompt.
        num_groups: groups that fill the batch.
        is_kept: whether a judged group is trained on, such as `DynamicSampler.is_kept`.
    """

    def __init__(
        self, prompts: range, num_samples: int, num_groups: int, is_kept: Callable[[JudgedGroup], bool]
    ) -> None:
        self._prompts, self._num_samples, self._num_groups, self._is_kept = prompts, num_samples, num_groups, is_kept
        self._parts: dict[int, list[JudgedGroup]] = {}
        self._whole: dict[int, JudgedGroup] = {}
        self._next = prompts.start
        self._num_kept = 0

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
            self._advance()

    def _advance(self) -> None:
        """Go past the prompts that are judged whole, as far as the batch needs any."""
        while not self.is_over and self._next in self._whole:
            self._num_kept += self._is_kept(self._whole[self._next])
            self._next += 1

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
