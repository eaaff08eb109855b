"""A run's verifiers are loaded before anything is generated, in a process apart: what is a user's own never runs here.

A name that means nothing and a signature that cannot be called stop the run in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_fipo.config import Config, DataSourceConfig, verifier_weights
from megatron_fipo.verifiers.inspection import inspect_verifiers
from megatron_fipo.verifiers.names import is_own_function


@dataclass(frozen=True)
class Findings:
    """The findings of an inspection of verifiers.

    Attributes:
        problems: why the run cannot be, each a sentence or more; with the source's key.
        warnings: what the user should know.
        row_readers: names of verifiers that ask for the rows of the data.
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    row_readers: frozenset[str] = field(default_factory=frozenset)

    def raise_problems(self) -> None:
        """Raise ValueError if there are any."""
        if len(self.problems) == 1:
            raise ValueError(self.problems[0])
        if self.problems:
            raise ValueError("\n  - ".join([f"{len(self.problems)} problems with verifiers:", *self.problems]))


def inspect_own(config: Config) -> Findings:
    """Load the verifiers that are a user's own, in a process apart. Reward models and built-in ones are not asked."""
    places: dict[str, list[str]] = {}
    for key, source in _sources(config):
        for name in verifier_weights(source):
            if is_own_function(name):
                places.setdefault(name, []).append(f"{key}.verifier")
    if not places:
        return Findings()
    found = inspect_verifiers(list(places))
    problems, warnings = [], []
    for name, keys in places.items():
        if found[name].problem:
            problems.append(f"{', '.join(keys)}: {found[name].problem}")
        elif found[name].doubt:
            warnings.append(f"{', '.join(keys)}: verifier {name}: {found[name].doubt}")
    row_readers = frozenset(name for name in places if found[name].wants_row)
    return Findings(tuple(problems), tuple(warnings), row_readers)


def _sources(config: Config) -> Iterator[tuple[str, DataSourceConfig]]:
    for part in ("train", "evaluation"):
        for name, source in getattr(config.data, part).items():
            yield f"data.{part}.{name}", source
