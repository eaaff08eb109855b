"""Writes docs/config.md: every configuration key with what it takes, its default and meaning, from its declaration.

python tools/docs/config_reference.py           # write it
python tools/docs/config_reference.py --check   # exit 1 if it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Dict, List, Union, get_args, get_origin

from megatron_fipo.config import ALGORITHMS, sections
from megatron_fipo.config.declaration import declaration_of
from megatron_fipo.config.keys import field_types

TARGET = Path(__file__).resolve().parents[2] / "docs" / "config.md"

HEAD = """# Configuration

A run is one YAML file with dotted overrides after it (`train.num_steps=5`). Later ones win: defaults, the preset of
`algorithm`, the file, the overrides. Unknown keys and impossible combinations are refused before anything is built;
`megatron-fipo validate CONFIG` shows the whole of it. `${section.key}` stands for another value, `${oc.env:NAME}` for
an environment variable, `\\${` for those two characters.

Relative paths start from the current folder. An input (`model.path`, a source's `path`) that is not there is looked for
in the folder of the configuration file, so a configuration with its model and data beside it works from anywhere. A run
writes below the current folder, and records absolute paths: its `config.yaml` works from anywhere, too.

**Text.** A key that takes text (names, paths, templates, URLs) gets it as it is written: `1.10`, `1e3`, `true` and
`007` stay what they are. In an override it is all that follows the first `=`, with `#`, brackets and spaces,
unless quotes stand around the whole of it (`run.name='a b'` for the shell, `"run.name='null'"` for a text that
would mean something else). `null` is null where the key may be null, and refused where it may not. In a file YAML's
rules hold: put text with `: `, ` #`, `{` or `[` into quotes; what YAML would drop as a comment is refused unless a
space follows the `#`. Lists are written `[0,1]`. `data.evaluation={}`
takes all sources away. `<<: *name` merges another section. `???` is refused: it means a value still to be given.
What a source's `params` hold is plain YAML.

**Secrets.** A value that comes from `${oc.env:NAME}` is used, and written down as that reference: in config.yaml,
checkpoints, W&B, the ledger, on the console and in messages (there, paths and names are shown as they are unless
the variable is called like a secret: KEY, TOKEN, PASS, PWD, PAT, AUTH, SECRET, CRED …). A run that continues
with another secret is the same run; one whose paths have changed by the environment says so. Values that stand in the
file or the override themselves are no secrets to the program.

`model.path` and sources of `kind: hub` may be names on the Hugging Face hub ([tutorial](tutorial.md#names-on-the-hub)).
What is fetched lies in the hub's own cache (`HF_HOME`); `config.yaml` beside the run has the names, and as their
revisions the commits that were used.

This page is generated from the declarations in `megatron_fipo/config/sections/` by `tools/docs/config_reference.py`.
"""


_TABLE = ["| key | takes | default | meaning |", "|---|---|---|---|"]
_KINDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    List[str]: "list of texts",
    List[int]: "list of whole numbers",
    List[float]: "list of numbers",
    Dict[str, Any]: "values by name",
    Dict[str, sections.DataSourceConfig]: "[sources](#a-source) by name",
    Dict[str, sections.ShadowConfig]: "[settings](#a-shadow-objective) by name",
}


def reference() -> str:
    """The page's text."""
    config, types = sections.Config, field_types(sections.Config)
    lines = [HEAD, *_TABLE, *_rows(config, "", [item for item in fields(config) if not is_dataclass(types[item.name])])]
    for name, kind in types.items():
        if not is_dataclass(kind):
            continue
        lines += ["", f"## {name}", "", inspect.getdoc(kind) or "", "", *_TABLE, *_rows(kind, f"{name}.", fields(kind))]
        if name == "data":
            lines += ["", "### A source", "", "Each entry of `data.train` and `data.evaluation`.", "", *_TABLE]
            lines += _rows(sections.DataSourceConfig, "", fields(sections.DataSourceConfig))
        if name == "objective":
            lines += [
                "",
                "### A shadow objective",
                "",
                "Each entry of `objective.shadow`; null takes the objective's own.",
            ]
            lines += ["", *_TABLE, *_rows(sections.ShadowConfig, "", fields(sections.ShadowConfig))]
    lines += ["", "## Algorithms", "", "| algorithm | sets |", "|---|---|"]
    lines += [f"| `{name}` | {', '.join(_preset(values))} |" for name, values in ALGORITHMS.items()]
    return "\n".join(lines) + "\n"


def _rows(section: type, prefix: str, items: Iterable[Field[Any]]) -> Iterator[str]:
    descriptions, types = _descriptions(section), field_types(section)
    for item in items:
        if item.default is not MISSING:
            default = item.default
        else:
            assert item.default_factory is not MISSING
            default = item.default_factory()
        shown = default if isinstance(default, str) and default else json.dumps(default)
        meaning = descriptions[item.name].replace("|", "\\|")
        yield f"| `{prefix}{item.name}` | {_taken(item, types[item.name])} | `{shown}` | {meaning} |"


def _taken(item: Field[Any], annotation: Any) -> str:
    """What a key takes: its type with its bounds, or its choices."""
    declared = declaration_of(item)
    alternatives = get_args(annotation) if get_origin(annotation) is Union else (annotation,)
    or_null = ", or null" if type(None) in alternatives else ""
    if declared.choices:
        several = ", or a list of several" if annotation is Any else ""
        return ", ".join(f"`{choice}`" for choice in (*declared.choices, *declared.forms)) + several + or_null
    bounds = declared.bounds(annotation)
    return f"{_KINDS[alternatives[0]]}{f', {bounds}' if bounds else ''}{or_null}"


def _preset(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _preset(value, f"{prefix}{name}.")
        else:
            yield f"`{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}`"


def _descriptions(section: type) -> dict[str, str]:
    """Field -> the string under it."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    return {
        statement.target.id: " ".join(str(following.value.value).split())
        for statement, following in zip(node.body, node.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }


def main() -> int:
    """Write or check. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/config.md from the configuration's dataclasses.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    text = reference()
    if not parser.parse_args().check:
        TARGET.write_text(text, encoding="utf-8")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print(f"{TARGET} is not up to date. Run: python {Path(__file__).name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
