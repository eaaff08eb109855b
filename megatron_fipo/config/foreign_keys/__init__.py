"""Names that other trainers have for our configuration keys; docs/migration.md and hints at unknown keys show them.

The names are those of TRL 1.16 (with transformers 5), verl 0.9, slime and NeMo-RL of August 2026 and ms-swift 4.6, read
in their public sources.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_fipo.config.foreign_keys.entry import ForeignKey, Topics
from megatron_fipo.config.foreign_keys.ms_swift import MS_SWIFT
from megatron_fipo.config.foreign_keys.nemo_rl import NEMO_RL
from megatron_fipo.config.foreign_keys.slime import SLIME
from megatron_fipo.config.foreign_keys.trl import TRL
from megatron_fipo.config.foreign_keys.verl import VERL

FRAMEWORKS: dict[str, Topics] = {
    "TRL": TRL,
    "verl": VERL,
    "slime": SLIME,
    "NeMo-RL": NEMO_RL,
    "ms-swift": MS_SWIFT,
}
"""Tables by the name of the trainer."""

GENERIC_LEAVES = {"name", "path", "enable", "mode", "n", "shuffle", "seed", "device", "strategy", "project"}
"""Last parts that mean something only together with the part before them."""


def foreign_hint(dotted_key: str) -> str | None:
    """What to write in place of a key that we do not have, if another trainer has it; else None.

    The key may be complete, or shortened from the left as people remember it (actor.ppo_mini_batch_size), or lie in a
    section of ours that it does not belong to (train.num_generations).
    """
    parts = dotted_key.lstrip("-").replace("-", "_").split(".")
    matches = _best_matches(parts)
    if in_its_section := [match for match in matches if any(ours.startswith(f"{parts[0]}.") for ours in match[1].keys)]:
        matches = in_its_section
    targets = list(dict.fromkeys(ours for _, entry in matches for ours in entry.keys))
    first = dict(reversed([(trainer, entry.name) for trainer, entry in matches]))  # one name for each trainer
    names = ", ".join(f"{trainer}'s {first[trainer]}" for trainer in FRAMEWORKS if trainer in first)
    if not matches or len(targets) > 4:
        return None
    note = f" {matches[0][1].note}" if len({entry.note for _, entry in matches}) == 1 and matches[0][1].note else ""
    if not targets:
        return f"Nothing here is set by {names}.{note}"
    return f"Did you mean {' or '.join(targets)} ({names})?{note}"


def _best_matches(parts: list[str]) -> list[tuple[str, ForeignKey]]:
    """Trainers and entries that share the most last parts with the key, if that is enough."""
    scored = [
        (_common(parts, entry.name.lstrip("-").replace("-", "_").split(".")), trainer, entry)
        for trainer, entry in _entries()
    ]
    best = max(score for score, _, _ in scored)
    return [(trainer, entry) for score, trainer, entry in scored if score == best] if best else []


def _common(parts: list[str], foreign: list[str]) -> int:
    """Number of last parts that two keys share; 0 for too weak a match. For "critic.*" the first parts count."""
    if foreign[-1] == "*":
        head = foreign[:-1]
        starts = (head[skipped:] for skipped in range(len(head)))
        return max(
            (100 + len(start) for start in starts if len(parts) > len(start) and parts[: len(start)] == start),
            default=0,
        )
    shared = 0
    for ours, theirs in zip(reversed(parts), reversed(foreign), strict=False):
        if ours != theirs:
            break
        shared += 1
    is_enough = shared > 1 or parts[-1] not in GENERIC_LEAVES or len(foreign) == len(parts)
    return shared if is_enough else 0


def _entries() -> Iterator[tuple[str, ForeignKey]]:
    for trainer, topics in FRAMEWORKS.items():
        for entries in topics.values():
            for entry in entries:
                yield trainer, entry
