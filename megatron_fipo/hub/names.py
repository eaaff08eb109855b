"""What is a name on the hub, and what is a path here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config.schema import REPOSITORY_NAME

COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(ValueError):
    """The hub does not give, or does not take, what a configuration names; the message says what to do."""


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, as a configuration names it.

    Attributes:
        key: that names it, for messages: "model.path".
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
        """What fetches all of it into the hub's cache."""
        kind = f" --repo-type {self.kind}" if self.kind != "model" else ""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{kind}{revision}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which cannot move."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))


def is_hub_name(path: str) -> bool:
    """Whether a model's path is a name on the hub rather than a folder.

    A folder here goes before the hub, and where its first part is a folder here ("outputs/typo") it is a path: a typing
    error must not fetch a stranger's model.
    """
    return bool(REPOSITORY_NAME.fullmatch(path)) and not Path(path).exists() and not Path(path.split("/")[0]).is_dir()
