"""Writes docs/migration.md, other trainers' keys (TRL, verl, …) beside ours: migration_head.md, then a table for each.

python tools/docs/migration.py           # write it
python tools/docs/migration.py --check   # exit 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_fipo.config.foreign_keys import FRAMEWORKS
from megatron_fipo.config.foreign_keys.entry import ForeignKey

TARGET = Path(__file__).resolve().parents[2] / "docs" / "migration.md"

HEAD = Path(__file__).with_name("migration_head.md")

TITLES = {
    "TRL": "`GRPOConfig`, the `TrainingArguments` under it, and the arguments of `GRPOTrainer`.",
    "verl": "Hydra keys of `ppo_trainer` and `ppo_megatron_trainer`.",
    "slime": "Command-line arguments, Megatron's among them, and SGLang's as `--sglang-…`.",
    "NeMo-RL": "Keys of `examples/configs/grpo_math_1B.yaml`, which `examples/run_grpo.py` reads.",
    "ms-swift": "Arguments of `swift rlhf --rlhf_type grpo` and `megatron rlhf` that are not TRL's; where it has TRL's "
    "names (`num_generations`, `max_completion_length`, `beta`), TRL's table holds.",
}


def page() -> str:
    """The page's text."""
    lines = [HEAD.read_text(encoding="utf-8")]
    for trainer, topics in FRAMEWORKS.items():
        lines += [f"## {trainer}", "", TITLES[trainer], ""]
        for topic, entries in topics.items():
            lines += [f"### {trainer}: {topic[0].lower()}{topic[1:]}", "", f"| {trainer} | here | |", "|---|---|---|"]
            lines += [_row(entry) for entry in entries]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _row(entry: ForeignKey) -> str:
    ours = ", ".join(f"`{name}`" for name in entry.keys) or "*none*"
    return f"| `{entry.name}` | {ours} | {entry.note.replace('<', '&lt;')} |"


def main() -> int:
    """Write or check. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/migration.md from megatron_fipo/config/foreign_keys.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    text = page()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print(f"{TARGET} is not up to date. Run: python tools/docs/{Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
