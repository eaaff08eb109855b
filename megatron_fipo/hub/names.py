"""A repository on the hub as configurations name it, and the error that is raised where the hub refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass

COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(ValueError):
    """The hub does not give, or does not take, what a configuration names; the message says what to do."""


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, as a configuration names it.

    Attributes:
        key: configuration key that names it, for messages: "model.path".
        name: owner/name.
        kind: model or dataset.
        revision: branch, tag or commit; None is its main branch.
    """

    key: str
    name: str
    kind: str = "model"
    revision: str | None = None

    @property
    def download_command(self) -> str:
        """The command that fetches all of it into the hub's cache."""
        kind = f" --repo-type {self.kind}" if self.kind != "model" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{kind}{revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which cannot move."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))
