"""Which ranks are on one machine."""

from __future__ import annotations

import os
from collections.abc import Sequence


def own_local_rank() -> int:
    """This process's number among those of its node, from 0; 0 where nobody has numbered them."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def node_of(rank: int, local_ranks: Sequence[int]) -> list[int]:
    """Ranks on the same node as `rank`.

    Args:
        local_ranks: LOCAL_RANK of each rank. The ranks of a node follow one another, and the first of them has 0.
    """
    first = max(other for other in range(rank + 1) if local_ranks[other] == 0)
    behind = [other for other in range(rank + 1, len(local_ranks)) if local_ranks[other] == 0]
    return list(range(first, min(behind, default=len(local_ranks))))
