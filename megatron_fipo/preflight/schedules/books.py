"""Which prompts are started, which groups a step trains on, and what became of every token."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_fipo.config import num_groups_to_begin
from megatron_fipo.preflight.schedules.server import Group, Response, make_group
from megatron_fipo.preflight.schedules.workload import Workload


@dataclass
class Tokens:
    """What became of the tokens that were generated.

    Attributes:
        trained: went into an update.
        dropped: of groups without a signal, which had to be generated to know that.
        wasted: of groups that nobody looked at or needed: aborted, surplus, or too old.
    """

    trained: int = 0
    dropped: int = 0
    wasted: int = 0


class Books:
    """Dynamic sampling in the order of prompts, with a bound on how old a group may be.

    The groups of a step are the first mixed ones in prompt order. A group that was started `bound` versions before the
    present one is due: left over for the next step it would be older than the bound. So a step is not closed while a
    due group is unfinished that comes before the last of its batch. With bound 0 every group is due, and the batch is
    exactly the first mixed groups in prompt order, whatever order they were finished in.
    """

    def __init__(
        self,
        workload: Workload,
        batch: int,
        bound: int = 0,
        *,
        waits: bool = True,
        restarts: bool | None = None,
        adapts: bool = True,
    ) -> None:
        """
        Args:
            batch: groups that a step trains on.
            bound: versions that may lie between a group's start and the step that trains on it.
            waits: whether the bound is kept: a step waits for groups that would exceed it, and throws away those that
                exceed it nevertheless. Without this only the start of prompts is bounded.
            restarts: whether prompts behind the batch come again in the next step, so that where a step begins does not
                depend on how many were in flight; None restarts them with bound 0, where none of them is kept.
            adapts: with bound 0, whether the number of prompts to start follows what is judged while others are in
                flight. The in-process engine waits for all of them, so that a run can be repeated.
        """
        if bound < 0 or batch < 1 or (bound == 0 and not waits):
            raise ValueError(f"batch={batch}, bound={bound}, waits={waits}: a bound of 0 is always kept.")
        self.workload, self.batch, self.bound = workload, batch, bound
        self.tokens = Tokens()
        self.version = 0
        self.next_prompt = 0
        self._in_training = 0
        self._waits = waits
        self._restarts = bound == 0 if restarts is None else restarts
        self._adapts = adapts
        self._num_started = self._most_to_start = 0
        self._unfinished: dict[int, Group] = {}
        self._judged: dict[int, Group] = {}
        self._ready: list[int] = []
        self._queue: list[Response] = []
        self._allow_more()

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
        """Whether another prompt may be started: groups that are expected to be kept do not exceed what is wanted.

        AReaL's rule (arXiv 2505.24298), counted in prompts: at most (bound + 1) batches may be in flight, ready or in
        the trainer, so that what is started now is trained on in time. With bound 0 there is no later step to make up
        for a batch that is not filled, so that more are started than are expected to do, as a run with
        sampling.streaming does it; here the share that is kept is known from the start.
        """
        if self.bound == 0:
            return self._num_started < self._most_to_start
        expected = self.workload.kept * len(self._unfinished)
        return self._in_training + len(self._ready) + expected < (self.bound + 1) * self.batch

    def _allow_more(self) -> None:
        """With bound 0, find how many of the step's prompts may be started."""
        if self._adapts or not self._unfinished:
            judged = self._num_started - len(self._unfinished)
            needed = judged + num_groups_to_begin(self.batch - len(self._ready), self.workload.kept)
            self._most_to_start = max(self._most_to_start, needed)

    def peek(self) -> Response | None:
        """The next response to hand out; None if no prompt may be started."""
        if not self._queue:
            if not self.may_start:
                return None
            self._queue = self.start().responses[::-1]
        return self._queue[-1]

    def take(self) -> Response:
        """Take what `peek` showed."""
        return self._queue.pop()

    def start(self) -> Group:
        """Start the next prompt, without handing it out."""
        lengths, mixed = self.workload.group(self.next_prompt)
        group = make_group(self.next_prompt, lengths, mixed, self.version)
        self._unfinished[group.prompt] = group
        self.next_prompt += 1
        self._num_started += 1
        return group

    def go_on_with(self, responses: Iterable[Response]) -> None:
        """Hand these out again, before anything else, those with the most tokens first."""
        here = [response for response in responses if response.group.prompt in self._unfinished]
        self._queue += sorted(here, key=lambda response: response.made)

    def finish(self, response: Response) -> bool:
        """Note that a response is finished. Returns whether its group is, too."""
        group = response.group
        group.unfinished -= 1
        if group.unfinished:
            return False
        del self._unfinished[group.prompt]
        self._judged[group.prompt] = group
        if group.mixed:
            self._file(group)
        self._allow_more()
        return True

    def _file(self, group: Group) -> None:
        """Put a group among those that are ready."""
        insort(self._ready, group.prompt)

    @property
    def is_full(self) -> bool:
        """Whether the step can be closed."""
        if len(self._ready) < self.batch:
            return False
        if not self._waits or not self._unfinished:
            return True
        oldest = next(iter(self._unfinished.values()))
        return not self._is_due(oldest) or oldest.prompt > self._ready[self.batch - 1]

    def close(self, abort: Callable[[list[Response]], None]) -> list[Group]:
        """Take the step's groups. What carries no signal and lies before the last of them is dropped; what is too old
        for the next step is thrown away.

        Args:
            abort: stops responses that are thrown away, wherever they run.
        """
        chosen, self._ready = self._ready[: self.batch], self._ready[self.batch :]
        taken = [self._judged.pop(prompt) for prompt in chosen]
        self.tokens.trained += sum(group.tokens for group in taken)
        last = max(chosen)
        for group in [group for group in self._judged.values() if not group.mixed and group.prompt < last]:
            self.tokens.dropped += self._judged.pop(group.prompt).tokens
        if self._waits:
            self._throw_away_what_is_due(abort)
        if self._restarts:
            self.next_prompt = last + 1
        self._in_training = self.batch
        self._num_started, self._most_to_start = len(self._unfinished), 0
        self._allow_more()
        return taken

    def next_version(self) -> None:
        """Note that the trainer is done: what is started from now on begins with its weights."""
        self._in_training = 0
        self.version += 1

    def _throw_away_what_is_due(self, abort: Callable[[list[Response]], None]) -> None:
        late = [group for group in self._unfinished.values() if self._is_due(group)]
        abort([response for group in late for response in group.responses])
        late += [group for group in self._judged.values() if self._is_due(group)]
        gone = {group.prompt for group in late}
        for prompt in gone:
            self._unfinished.pop(prompt, None)
            self._judged.pop(prompt, None)
        self._ready = [prompt for prompt in self._ready if prompt not in gone]
        self._queue = [response for response in self._queue if response.group.prompt not in gone]
        self.tokens.wasted += sum(group.tokens for group in late)

    def _is_due(self, group: Group) -> bool:
        return self.version - group.version >= self.bound
