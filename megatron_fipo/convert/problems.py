"""Problems that weights may have, each with a name of its own, and the errors that list them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.convert.dtypes import dtype_name

_MOST_SHOWN = 20
"""An error lists this many problems, and counts the others."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: unmapped, missing, extra, truncated, unreadable, shape, dtype, not finite, vocabulary or different.
        tensor: the tensor's name.
        place: the folder and file that the tensor is in, or should be in.
        detail: what is found and what was expected.
    """

    kind: str
    tensor: str
    place: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.tensor} in {self.place}: {self.detail}"


class ProblemsError(ValueError):
    """Weights that must not be used; the message lists what is wrong with them."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        lines = [str(problem) for problem in problems[:_MOST_SHOWN]]
        if len(problems) > _MOST_SHOWN:
            lines.append(f"and {len(problems) - _MOST_SHOWN} more")
        super().__init__("\n".join(lines))
        self.problems = list(problems)


def placed(problems: Iterable[Problem], folder: Path) -> list[Problem]:
    """The problems with the folder's name put before the file's."""
    return [replace(problem, place=f"{folder.resolve().name}/{problem.place}") for problem in problems]


def not_finite(name: str, place: str, tensor: Tensor) -> list[Problem]:
    """A problem if the tensor holds NaN or infinity."""
    low, high = tensor.aminmax()  # either is NaN if any element is; allocates nothing
    if torch.isfinite(low) and torch.isfinite(high):
        return []
    bad = ~torch.isfinite(tensor)
    where, values = bad.nonzero()[0].tolist(), tensor[bad]
    detail = (
        f"{len(values)} of {tensor.numel()} elements are not finite in {dtype_name(tensor.dtype)}, the first, "
        f"{float(values[0])}, at {where}"
    )
    return [Problem("not finite", name, place, detail)]


class NotFiniteError(ProblemsError):
    """Weights that hold NaN or infinity."""

    def __init__(self, folder: Path, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        remedy = "Copy or download the model again; if training made it so, take an earlier save of it."
        self.args = (
            f"{folder}: weights hold NaN or infinity, and nothing can be generated or trained from "
            f"them.\n{self}\n{remedy}",
        )
