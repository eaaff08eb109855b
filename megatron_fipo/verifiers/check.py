"""Inspects a user's own verifiers in a separate process before anything is generated; their code never runs here.

A name that cannot be imported and a signature that cannot be called stop the run with an error message.
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
        problems: reasons why the run cannot start, each with the source's key.
        warnings: likely mistakes that do not stop the run.
        row_readers: names of the verifiers that take the rows of the data.
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    row_readers: frozenset[str] = field(default_factory=frozenset)

    def raise_problems(self) -> None:
        """Raise ValueError if there are problems."""
        if len(self.problems) == 1:
            raise ValueError(self.problems[0])
        if self.problems:
            raise ValueError("\n  - ".join([f"{len(self.problems)} problems with verifiers:", *self.problems]))


def inspect_own(config: Config) -> Findings:
    """Load the user's own verifiers in a separate process. Reward models and built-in verifiers are not inspected."""
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
