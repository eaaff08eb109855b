"""The documentation says what the code does: links, configuration keys, metrics, the generated reference."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import cli
from megatron_fipo.config import Config, DataSourceConfig, load_config, validate
from megatron_fipo.config.errors import NOT_SHOWN, Problem
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.verdict import VerifierJob
from tests.unit import documented_metrics as metrics
from tools.docs import figures

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*/README.md"),
        *ROOT.glob("tools/*/README.md"),
    ]
)
TUTORIAL = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
SECTIONS = {
    item.name: {key.name for key in fields(item.default_factory)}  # type: ignore[arg-type]
    for item in fields(Config)
    if is_dataclass(item.default_factory)
}


def test_the_configuration_reference_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools/docs/config_reference.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr


# --- links ----------------------------------------------------------------------------------------------------------


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a page whose file, or heading in a page, is not there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (heading and heading not in _anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def _anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", _without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_is_noticed() -> None:
    page = ROOT / "docs/metrics.md"
    text = "[a](nowhere.md) [b](metrics.md#no-such-heading) [c](metrics.md#fipo) [d](../README.md) [e](https://x.y/z)"
    assert broken_links(page, text) == ["nowhere.md", "metrics.md#no-such-heading"]


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    missing = [
        page.name for page in ROOT.glob("docs/*.md") if page.name != "README.md" and f"]({page.name}" not in index
    ]
    assert not missing


# --- configuration keys -----------------------------------------------------------------------------------------------


def unknown_keys(text: str) -> list[str]:
    """Keys in backticks, `section.key` or `section.key=value`, that no section has."""
    unknown = []
    for quoted in re.findall(r"`([^`\n]+)`", _without_code(text)):
        for section, key in re.findall(r"(?:^|\s)([a-z_]+)\.([a-z_]+)(?=$|[=\s.])", quoted):
            if section in SECTIONS and key not in SECTIONS[section] and not _is_file(section, key):
                unknown.append(f"{section}.{key}")
    return unknown


def _is_file(section: str, key: str) -> bool:
    """metrics.jsonl and the like, whose first part happens to be a section's name."""
    return key in ("py", "md", "json", "jsonl", "yaml", "lock", "safetensors")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_configuration_key_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == "migration.md":  # test_foreign_keys.py holds its tables, whose first column has others' keys
        text = re.sub(r"^\|.*", "", text, flags=re.MULTILINE)
    assert not unknown_keys(text)


def test_an_unknown_key_is_noticed() -> None:
    text = "`train.num_steps` `rollout.num_promts=4` `metrics.jsonl` `a train.num_step b` `data.train.x.path`"
    assert unknown_keys(text) == ["rollout.num_promts", "train.num_step"]


def test_the_tutorial_explains_every_key_of_a_source() -> None:
    assert [item.name for item in fields(DataSourceConfig) if f"`{item.name}`" not in TUTORIAL] == []


# --- commands and examples --------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """Words of every command in a page's shell blocks; continued lines are one."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables in front
                words.pop(0)
            if words:
                found.append(words)
    return found


def faults(words: list[str]) -> list[str]:
    """What is wrong with a command: an option, key, file or make target that does not exist."""
    found = [
        word
        for word in words
        if (match := re.match(r"([a-z_]+)\.([a-z_]+)[.=]", word))
        and match[1] in SECTIONS
        and match[2] not in SECTIONS[match[1]]
    ]
    found += [
        word for word in words if re.match(r"(tools|examples)/.*\.(py|sh|yaml)$", word) and not (ROOT / word).is_file()
    ]
    if (arguments := _arguments(words)) is not None:
        try:
            cli.parse(arguments)
        except SystemExit:
            found.append(" ".join(words))
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        found += [word for word in words[1:] if "=" not in word and word not in targets]
    return found


def _arguments(words: list[str]) -> list[str] | None:
    """What a call of the command line, or of a tool that is one of its commands, hands to its parser."""
    if words[0].endswith("megatron-fipo"):
        return words[1:]
    if words[1:3] == ["-m", "megatron_fipo.cli"]:
        return words[3:]
    if len(words) > 1 and (tool := re.fullmatch(r"tools/convert/(\w+)\.py", words[1])):
        return ["convert", tool[1].replace("_", "-"), *words[2:]]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_those_that_exist(page: Path) -> None:
    found = {" ".join(words): faults(words) for words in commands(page.read_text(encoding="utf-8"))}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def test_a_wrong_command_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    text = """```bash
make demo ARGS="x"   # fine
make dem
NODE_RANK=0 torchrun -m megatron_fipo.train examples/quickstart/fipo.yaml train.num_step=5 \\
    examples/nowhere/fipo.yaml
megatron-fipo evaluate c.yaml --modell x
megatron-fipo preflight c.yaml train.num_steps=5 --world-size 32
$PYTHON -m megatron_fipo.cli submit c.yaml --cluster file --drier
python tools/convert/verify.py a b --logit
```"""
    assert [faults(words) for words in commands(text)] == [
        [],
        ["dem"],
        ["train.num_step=5", "examples/nowhere/fipo.yaml"],
        ["megatron-fipo evaluate c.yaml --modell x"],
        [],
        ["$PYTHON -m megatron_fipo.cli submit c.yaml --cluster file --drier"],
        ["python tools/convert/verify.py a b --logit"],
    ]


CONFIGURATIONS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
    if re.search(r"^algorithm:", block, re.MULTILINE)
]


@pytest.mark.parametrize("block", CONFIGURATIONS)
def test_configurations_are_valid(block: str, tmp_path: Path) -> None:
    (tmp_path / "my_run.yaml").write_text(block)
    config = load_config(tmp_path / "my_run.yaml", [])
    validate(config, world_size=2 * config.parallel.tp * config.parallel.pp * config.parallel.cp)


def test_the_tutorial_shows_what_init_writes() -> None:
    block, _ = re.findall(r"^```yaml\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
    (row,) = re.findall(r"^```json\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
    written = ROOT / "megatron_fipo/starters/own_data"
    assert block in (written / "fipo.yaml").read_text()
    assert row in (written / "train.jsonl").read_text().splitlines(keepends=True)


def test_the_tutorials_names_on_the_hub_make_a_configuration(tmp_path: Path) -> None:
    _, named = re.findall(r"^```yaml\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
    (tmp_path / "named.yaml").write_text(named)
    validate(load_config(tmp_path / "named.yaml", []))


def test_the_tutorials_verifier_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"^```python\n(# judges.py\n.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)
    (tmp_path / "judges.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    with VerifierPool(verifiers=["judges:verify"]) as pool:
        right, wrong = pool.judge_all([VerifierJob("judges:verify", text, 42) for text in ("12+30=42", "12+30=43")])
    assert (right.score, right.answer, right.error) == (1.0, "42", "")
    assert (wrong.score, wrong.error) == (0.0, "")


# --- metrics ----------------------------------------------------------------------------------------------------------

DOCUMENTED = metrics.documented_names(GLOSSARY)


def test_every_metric_is_in_the_glossary() -> None:
    missing = {
        name for name in metrics.measured_names() if not any(metrics.is_entry_for(entry, name) for entry in DOCUMENTED)
    }
    assert not missing


def test_every_metric_that_the_source_spells_out_is_in_the_glossary() -> None:
    missing = [
        (place, name)
        for place, name in metrics.source_names(ROOT / "megatron_fipo")
        if not any(metrics.is_entry_for_source(entry, name) for entry in DOCUMENTED)
    ]
    assert not missing


def test_the_glossary_has_no_metric_that_nothing_writes() -> None:
    measured = metrics.measured_names()
    spelled_out = [name for _, name in metrics.source_names(ROOT / "megatron_fipo")]
    unwritten = {
        entry
        for entry in DOCUMENTED
        if not any(metrics.is_entry_for(entry, name) for name in measured)
        and not any(metrics.is_entry_for_source(entry, name) for name in spelled_out if "\0" not in name)
    }
    assert not unwritten


def test_a_metric_without_an_entry_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "new.py").write_text('metrics = {"policy/brand_new/mean": 1}\nmetrics[f"fipo/{x}/newer"] = 2\n')
    found = [name for _, name in metrics.source_names(tmp_path)]
    assert found == ["policy/brand_new/mean", "fipo/\0/newer"]
    assert not any(metrics.is_entry_for_source(entry, name) for entry in DOCUMENTED for name in found)


# --- messages ---------------------------------------------------------------------------------------------------------

TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
FIELD = "\N{OBJECT REPLACEMENT CHARACTER}"
"""In place of what is known at run time only."""


def explained_messages(page: str) -> list[re.Pattern[str]]:
    """What stands in the first column, in backticks; … is anything."""
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    return [re.compile(".*".join(re.escape(part) for part in text.strip("…").split("…")), re.DOTALL) for text in quoted]


def spelled_out(tree: ast.AST) -> set[str]:
    """Texts in a piece of source, a FIELD for each part that is known at run time only."""
    texts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(re.sub(r"%[rsd]", FIELD, node.value))
        elif isinstance(node, ast.JoinedStr | ast.BinOp):
            texts.add(_joined(node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem":
            texts.add(str(Problem(*map(_argument, node.args))))
    return texts


def _argument(node: ast.expr) -> Any:
    """An argument of `Problem`: what is written out, else what stands for it in texts."""
    if isinstance(node, ast.Name) and node.id == "NOT_SHOWN":
        return NOT_SHOWN
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _joined(node)


def _joined(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_joined(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined(node.left) + _joined(node.right)
    return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else FIELD


def test_every_message_that_is_explained_exists() -> None:
    sources = (ROOT / "megatron_fipo").rglob("*.py")
    texts = [text for path in sources for text in spelled_out(ast.parse(path.read_text(encoding="utf-8")))]
    messages = explained_messages(TROUBLESHOOTING)
    assert len(messages) > 60
    assert [message.pattern for message in messages if not any(map(message.search, texts))] == []


def warning_texts(tree: ast.AST, given: set[str]) -> set[str]:
    """What a module warns of: texts in functions that are registered or named as warnings or among those `given`, in
    calls that warn, and in what a plan finds wanting.
    """
    texts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (_is_warning(node) or node.name in given):
            texts |= {text for statement in node.body[_has_docstring(node) :] for text in spelled_out(statement)}
        elif isinstance(node, ast.Call) and (
            (isinstance(node.func, ast.Attribute) and node.func.attr == "warning") or _level_of_finding(node)
        ):
            texts |= spelled_out(node)
    return texts


def _is_warning(function: ast.FunctionDef) -> bool:
    is_registered = any(ast.unparse(decorator) == "warns" for decorator in function.decorator_list)
    return is_registered or re.search(r"(^|_)warnings?$", function.name) is not None


def _level_of_finding(node: ast.AST) -> str:
    """WARNS or FAILS for `Finding(WARNS, …)`; what is missing says its own remedy."""
    is_finding = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding"
    level = ast.unparse(node.args[0]) if is_finding and isinstance(node, ast.Call) and node.args else ""
    return level if level in ("WARNS", "FAILS") else ""


def _found_one_by_one(node: ast.GeneratorExp) -> list[str]:
    """f of `Finding(WARNS, text) for text in f(…)`."""
    called = node.generators[0].iter
    is_warning = _level_of_finding(node.elt) == "WARNS"
    return [called.func.id] if is_warning and isinstance(called, ast.Call) and isinstance(called.func, ast.Name) else []


def unexplained(trees: Sequence[ast.AST]) -> set[str]:
    """Warnings of a sentence's length that the page does not explain."""
    given = {
        name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.GeneratorExp)
        for name in _found_one_by_one(node)
    }
    texts = {text for tree in trees for text in warning_texts(tree, given)}
    parts = {text for text in texts if any(text != other and text in other for other in texts)}
    messages = explained_messages(TROUBLESHOOTING)
    return {text for text in texts - parts if len(text) > 60 and not any(message.search(text) for message in messages)}


def _has_docstring(function: ast.FunctionDef) -> int:
    return int(ast.get_docstring(function) is not None)


def test_every_warning_is_explained() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "megatron_fipo").rglob("*.py")]
    assert unexplained(trees) == set()


@pytest.mark.parametrize(
    "source",
    [
        "@warns\ndef _anything(config, model_config):\n    yield f'{S}: {config}'",
        "def _noise_warning(x):\n    return f'{S}: {x}'",
        "console.warning(f'{S}: {x}')",
        "def f():\n    yield Finding(WARNS, f'{S}: {x}')",
        "def problems():\n    yield f'{S}: {x}'\nfound = [*(Finding(WARNS, text) for text in problems())]",
    ],
)
def test_a_warning_without_an_explanation_is_noticed(source: str) -> None:
    sentence = "something that nobody has ever heard of is wrong with the run, and here is what to do"
    assert unexplained([ast.parse(source.replace("{S}", sentence))]) == {f"{sentence}: {FIELD}"}


def test_a_problem_is_read_as_its_sentence() -> None:
    tree = ast.parse("Problem('a.b', value, f'must be one of {choices}', 'Set it')")
    assert f"a.b={FIELD}: must be one of {FIELD}. Set it." in spelled_out(tree)
    tree = ast.parse("[Problem('a.b', [], 'GPUs are needed'), Problem(key, NOT_SHOWN, 'is secret')]")
    assert {"a.b is empty: GPUs are needed.", f"{FIELD}: is secret."} <= spelled_out(tree)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figure_is_what_the_package_computes() -> None:
    response, objective = figures.made_up_response(), figures.OBJECTIVE
    decay, following = 0.5 ** (1 / objective.half_life_tokens), 0.0
    for token in reversed(range(figures.NUM_TOKENS)):
        shift = float(response.shift[token]) if token != figures.EXTREME else 0.0
        following = shift + decay * following
        assert float(response.future_kl[token]) == pytest.approx(following, abs=1e-6)
    assert objective.dual_clip is not None
    assert float(response.shift[figures.EXTREME].exp()) > objective.dual_clip
    assert float(response.weights.min()) == pytest.approx(objective.influence_min)
    assert float(response.weights.max()) == pytest.approx(objective.influence_max)


def test_the_sharded_figure_is_the_same_sum() -> None:
    response = figures.made_up_response()
    sharded = figures.sharded_sum(response)
    assert float((sharded.own + sharded.behind - response.future_kl).abs().max()) < 1e-6
    assert float(sharded.behind.abs().max()) > 0.1, "without the exchange it would be another"
    assert sharded.ranks == (0, 1, 1, 0)


def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--output", str(tmp_path)])
    figures.main()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in (ROOT / "docs/figures").glob("*.svg")}
