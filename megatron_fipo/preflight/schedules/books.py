"""Which prompts are started, which groups a step trains on, and what became of every token."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fipo.config import num_groups_ahead, num_groups_to_begin
from megatron_fipo.preflight.schedules.server import Group, Response, make_group
from megatron_fipo.preflight.schedules.workload import Workload


@dataclass
class Tokens:
    """What became of the tokens that were generated.

    Attributes:
        trained: went into an update.
        dropped: of groups without a signal, which had to be generated to know that.
        wasted: that nobody looked at or needed: aborted, surplus, or too old.
    """

    trained: int = 0
    dropped: int = 0
    wasted: int = 0


class Books:
    """Dynamic sampling in the order of prompts, as a run with sampling.streaming has it.

    The groups of a step are the first mixed ones in prompt order, whatever order they were finished in: it is closed
    when all prompts before the last of them are judged. With a bound of 0 nothing outlives a step. With a larger one,
    rollout.max_staleness_steps, prompts are begun ahead, and what is begun and not used goes on in the next step.
    """

    def __init__(
        self, workload: Workload, batch: int, bound: int = 0, *, adapts: bool = True, drops: bool = True
    ) -> None:
        """
        Args:
            batch: groups that a step trains on.
            bound: versions that may lie between the weights that write a token and the step that trains on it.
            adapts: whether the number of prompts to start follows what is judged while others are in flight. On-policy,
                the in-process engine waits for all of them, so that a run can be repeated.
            drops: whether what would exceed the bound in the next step is begun anew there (rollout.too_stale=drop).
        """
        if bound < 0 or batch < 1:
            raise ValueError(f"batch={batch}, bound={bound}: a batch has a group, and a bound is not negative.")
        self.workload, self.batch, self.bound = workload, batch, bound
        self.tokens = Tokens()
        self.version = 0
        self.next_prompt = 0
        self._adapts, self._drops = adapts, drops
        self._unfinished: dict[int, Group] = {}
        self._judged: dict[int, Group] = {}
        self._ready: list[int] = []
        self._queue: list[Response] = []
        self._front, self._num_kept_before = 0, 0
        """The first prompt that is not judged, and the groups before it that are kept and not trained on."""
        self._num_started, self._most_to_start = 0, self._num_wanted()

    @property
    def num_ready(self) -> int:
        """Mixed groups that are finished and not trained on."""
        return len(self._ready)

    @property
    def carried_tokens(self) -> int:
        """Tokens of groups that are still in the books."""
        return sum(group.tokens for groups in (self._unfinished, self._judged) for group in groups.values())

    @property
    def may_start(self) -> bool:
        """Whether another prompt may be started.

        As in a run: what the step needs, and what is expected to be used before it is too old. Here the share that is
        kept is known from the start.
        """
        return self._num_started < self._most_to_start

    def _num_wanted(self) -> int:
        """Prompts that should be started, from the first one that no step has used."""
        kept = self.workload.kept
        needed = len(self._judged) + num_groups_to_begin(self.batch - len(self._ready), kept)
        return max(needed, num_groups_ahead(self.batch, kept, self.bound))

    def peek(self) -> Response | None:
        """The next response to hand out; None if no prompt may be started."""
        while not self._queue:
            if not self.may_start:
                return None
            self._queue = [response for response in self.start().responses if not response.made][::-1]
        return self._queue[-1]

    def take(self) -> Response:
        """Take what `peek` showed."""
        return self._queue.pop()

    def start(self) -> Group:
        """Start the next prompt, without handing it out. Of one that a step before has begun some may be finished."""
        prompt = self.next_prompt
        self.next_prompt += 1
        self._num_started += 1
        known = self._unfinished.get(prompt) or self._judged.get(prompt)
        if known is not None:
            return known
        group = make_group(prompt, *self.workload.group(prompt), self.version)
        self._unfinished[prompt] = group
        return group

    def go_on_with(self, responses: Iterable[Response]) -> None:
        """Hand these out again, before anything else, in the order of prompts; without those that were thrown away."""
        here = [one for one in (*self._queue, *responses) if one.made and one.group.prompt in self._unfinished]
        self._queue = sorted(here, key=lambda response: -response.group.prompt)

    def finish(self, response: Response) -> bool:
        """Note that a response is finished. Returns whether its group is, too."""
        group = response.group
        response.is_finished = True
        group.unfinished -= 1
        if group.unfinished:
            return False
        del self._unfinished[group.prompt]
        self._judged[group.prompt] = group
        if group.mixed:
            self._file(group)
        self._advance()
        if self._adapts or not self._unfinished:
            self._most_to_start = max(self._most_to_start, self._num_wanted())
        return True

    def _file(self, group: Group) -> None:
        """Put a group among those that are ready."""
        insort(self._ready, group.prompt)

    def _advance(self) -> None:
        """Go past the prompts that are judged."""
        while (group := self._judged.get(self._front)) is not None:
            self._num_kept_before += group.mixed
            self._front += 1

    @property
    def is_full(self) -> bool:
        """Whether the step can be closed."""
        return self._num_kept_before >= self.batch

    def close(self) -> list[Group]:
        """Take the step's groups. What carries no signal and lies before the last of them is dropped; what is too old
        for the next step is thrown away. Nothing that is thrown away may still run.
        """
        chosen, self._ready = self._ready[: self.batch], self._ready[self.batch :]
        taken = [self._judged.pop(prompt) for prompt in chosen]
        self.tokens.trained += sum(group.tokens for group in taken)
        last = max(chosen)
        for group in [group for group in self._judged.values() if not group.mixed and group.prompt < last]:
            self.tokens.dropped += self._judged.pop(group.prompt).tokens
        self._leave_behind(last)
        return taken

    def _leave_behind(self, last: int) -> None:
        """Throw away what is too old for the next step, and begin that with the first prompt that no step has used."""
        for group in (*self._unfinished.values(), *self._judged.values()):
            for response in group.responses:
                if self._drops and response.made and self.version + 1 - response.spans[0][0] > self.bound:
                    self.tokens.wasted += response.made
                    self._begin_anew(response)
            if not group.tokens:  # the next step starts it as if nobody had
                del self._unfinished[group.prompt]
        self.next_prompt = self._front = last + 1
        self._num_kept_before = 0
        self._advance()
        self._num_started, self._most_to_start = 0, self._num_wanted()

    def _begin_anew(self, response: Response) -> None:
        group = response.group
        if response.is_finished:
            group.unfinished += 1
        if self._judged.pop(group.prompt, None) is not None:
            self._unfinished[group.prompt] = group
            if group.mixed:
                self._ready.remove(group.prompt)
        response.made, response.spans, response.is_finished = 0, [], False

    def next_version(self) -> None:
        """Note that the trainer is done: what is started from now on begins with its weights."""
        self.version += 1
