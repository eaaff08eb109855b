"""The page is whole, needs no network, and takes no text for markup; the command writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_fipo
from megatron_fipo.analysis.of_run import analyse_run
from megatron_fipo.report import page_file, report_command
from megatron_fipo.report.page_file import MARKS, Page, plotting_library, safe_json, write_page
from megatron_fipo.report.report_data import Report, make_report
from megatron_fipo.report.run_data import RunData, read_run
from megatron_fipo.traces.files import write_trace
from tests.unit.report_runs import judged, scores_line, training_lines, write_run
from tests.unit.test_report_credit import traced

TEMPLATE = """<!doctype html><html><head>
<meta http-equiv="Content-Security-Policy" content="default-src 'self'">
<!--@STYLE--></head><body><!--@DATA--><!--@TOKENS--><!--@PLOTTING--><!--@SCRIPTS--></body></html>"""
PAGE = Page(TEMPLATE, "p { color: red }", "start();", "plot = 1 < 2 && '<b>';")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "</SCRIPT ><script>alert(1)</script>",
    "<!-- <script> -->",
    "]]> --> <![CDATA[",
    "\ud800 lone \udfff",
    "nul \x00 bell \x07 escape \x1b[2J",
    "\u202eright to left\u202c \u2066x\u2069",
    "line\u2028and\u2029paragraph",
    "<!--@TOKENS--><!--@DATA-->",
    "\"quotes' & \\backslash\\ ${x} `y`",
    "\\1 \\g<0> é 漢字 😀",
)


class Elements(HTMLParser):
    """Every start tag with its attributes, and what stands in scripts and styles, as a browser splits a page up."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in ("script", "style"):
            self.contents.append((self.tags[-1][1].get("id") or self.tags[-1][0], data))

    def named(self, key: str) -> Any:
        return json.loads("".join(text for name, text in self.contents if name == key))


def made(run: RunData, max_tokens: int) -> Report:
    return make_report([run], [analyse_run(run.folder)], max_tokens)


def report_of(data: dict[str, Any], tokens: dict[str, Any] | None = None, is_live: bool = False) -> Report:
    return Report({"is_live": is_live, **data}, tokens or {}, 0, 0)


def hostile_run(folder: Path) -> Path:
    """A run whose every text is hostile."""
    text = " ".join(HOSTILE)
    problems = judged([1, 0])
    problems = [
        type(problems[0])(
            **{**vars(problems[0]), "prompt": text, "reference": text, "responses": (text,) * 2, "answers": (text,) * 2}
        )
    ]
    lines = [*training_lines(reward__mean=[0.1] * 6), scores_line(6, 0.5)]
    lines[0]["reward/verifier/</script><b>/mean"] = 1.0
    changes = {"run.name": "</script><img onerror=x>", "data.train.chains.prompt_template": HOSTILE[0]}
    run = write_run(folder, lines, changes, problems={"before_held_out": problems, "after_held_out": problems})
    texts = [text.encode("utf-8", "replace").decode() for text in HOSTILE[:3]]
    write_trace(run / "traces", [traced(3, texts=texts, prompt=texts[0], answer=texts[1])], {})
    return run


# --- the page ---------------------------------------------------------------------------------------------------------


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    report = made(read_run(hostile_run(tmp_path / "run")), 100)
    html = PAGE.html(report)
    page = Elements(html)
    assert [tag for tag, _ in page.tags] == ["html", "head", "meta", "style", "body", *["script"] * 4]
    assert page.named("report-data") == json.loads(json.dumps(report.data))
    (key,) = report.tokens
    assert page.named(key) == report.tokens[key]
    assert page.named(key)["texts"][0] == HOSTILE[0]
    sample = page.named("report-data")["runs"][0]["samples"]["after"][0]
    assert sample["prompt"] == sample["response"] == sample["answer"] == " ".join(HOSTILE)
    own = TEMPLATE + PAGE.plotting
    assert html.count("<!--") == 0
    assert html.lower().count("</script") == 4
    assert set(html) - set(own) <= {chr(code) for code in range(32, 127)} | {"\n"}, "what is put in is ASCII"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_comes_out_of_the_page_as_it_went_in(text: str) -> None:
    escaped = safe_json({"text": text})
    assert json.loads(escaped) == {"text": text}
    assert escaped.isascii()
    assert escaped.isprintable()
    assert not set("<>&") & set(escaped)


def test_without_escapes_the_page_would_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(page_file, "safe_json", json.dumps)
    page = Elements(PAGE.html(report_of({"text": HOSTILE[0]})))
    assert ("img", {"src": "x", "onerror": "alert(1)"}) in page.tags


def test_every_part_has_its_place() -> None:
    page = Elements(PAGE.html(report_of({"a": 1}, {"t1": {"b": 2}, "t2": {"c": 3}})))
    texts = [(name, text.strip()) for name, text in page.contents if text.strip()]
    assert texts == [
        ("style", PAGE.style),
        ("report-data", '{"is_live":false,"a":1}'),
        ("t1", '{"b":2}'),
        ("t2", '{"c":3}'),
        ("script", PAGE.plotting),
        ("script", PAGE.scripts),
    ]
    kinds = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert kinds == [*["application/json"] * 3, None, None]


def test_the_policy_forbids_the_network() -> None:
    def policy(is_live: bool) -> dict[str, str]:
        tags = Elements(PAGE.html(report_of({}, is_live=is_live))).tags
        (content,) = [attributes["content"] for tag, attributes in tags if tag == "meta"]
        assert content is not None
        return {name: rest for name, _, rest in (part.strip().partition(" ") for part in content.split(";"))}

    allowed = {
        "default-src": "'none'",
        "script-src": "'unsafe-inline'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
        "connect-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert policy(False) == allowed
    assert policy(True) == {**allowed, "connect-src": "'self'"}


@pytest.mark.parametrize("mark", MARKS)
def test_a_template_without_a_mark_is_noticed(mark: str) -> None:
    for template in (TEMPLATE.replace(f"<!--@{mark}-->", ""), TEMPLATE + f"<!--@{mark}-->"):
        with pytest.raises(AssertionError, match="needs the marks"):
            Page(template, "", "", "")


def test_a_template_without_a_policy_and_dangerous_parts_are_noticed() -> None:
    with pytest.raises(AssertionError, match="content security policy"):
        Page(TEMPLATE.replace("Content-Security-Policy", "other"), "", "", "")
    for text in ("x = '</script>'", "/* <!-- */", "'<Script'", "</style>"):
        with pytest.raises(AssertionError, match="would end it"):
            Page(TEMPLATE, "", text, "")


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new/report.html"
    size = write_page(path, report_of({"a": 1}), PAGE)
    assert path.stat().st_size == size
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", _no_room)
    with pytest.raises(RuntimeError, match=r"report\.html cannot be written"):
        write_page(path, report_of({"a": 2}), PAGE)
    assert path.read_bytes() == before


def _no_room(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    changes = {"objective.influence_max": float("inf")}
    lines = training_lines(reward__mean=[0.123456789123, float("nan"), 0.5])
    run = read_run(write_run(tmp_path / "run", lines, changes))
    write_trace(run.folder / "traces", [traced(1, advantage=float("nan"))], {})
    data = json.loads(safe_json(made(run, 10).data))
    (only,) = data["runs"]
    assert only["metrics"]["reward/mean"] == [0.12345679, None, 0.5]
    assert only["objective"]["influence_max"] is None
    assert only["objective"]["half_life_tokens"] == 32.0
    assert only["groups"][0]["responses"][0]["advantage"] is None


def test_the_package_has_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_file, "plotting_library", lambda: "Plotly = 1;")
    report = made(read_run(hostile_run(tmp_path / "run")), 100)
    page = Elements(page_file.installed_page().html(report))
    assert page.named("report-data")["format"] == 1
    assert not any(tag == "img" for tag, _ in page.tags)


# --- the plotting library ---------------------------------------------------------------------------------------------


def test_the_plotting_library_is_a_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plotly/package_data").mkdir(parents=True)
    (tmp_path / "plotly/__init__.py").write_text("raise ImportError('this takes seconds')")
    (tmp_path / "plotly/package_data/plotly.min.js").write_text("Plotly = 1;")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "plotly", raising=False)
    assert plotting_library() == "Plotly = 1;"
    (tmp_path / "plotly/package_data/plotly.min.js").unlink()
    with pytest.raises(ValueError, match="pip install plotly"):
        plotting_library()
    monkeypatch.setattr(page_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install plotly"):
        plotting_library()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _own_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_file, "installed_page", lambda: PAGE)


def call(*arguments: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    return report_command.run(parser.parse_args(list(map(str, arguments))))


@pytest.mark.usefixtures("_own_page")
def test_a_runs_page_lies_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = hostile_run(tmp_path / "run")
    write_trace(run / "traces", [traced(3, step=2, sample_index=place) for place in range(4)], {})
    assert call(run, "--max-trace-tokens", 12) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run / 'report.html'} (0.0 MB): open it in a browser; it needs no network.\n")
    assert "It shows 4 of 5 traced responses; --max-trace-tokens 24 would show more." in said
    data = Elements((run / "report.html").read_text(encoding="utf-8")).named("report-data")
    assert data["format"] == 1
    assert data["version"] == megatron_fipo.__version__
    assert data["is_live"] is False
    assert data["comparison"] is None
    assert data["runs"][0]["traces"] == {"num_responses": 5, "num_left_out": 1}


@pytest.mark.usefixtures("_own_page")
def test_the_page_of_several_runs_lies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [
        write_run(
            tmp_path / f"r{seed}", training_lines(reward__mean=[0.5] * 6), {"run.seed": seed, "run.name": f"n{seed}"}
        )
        for seed in range(3)
    ]
    assert call(*runs) == 0
    data = Elements((tmp_path / "report.html").read_text(encoding="utf-8")).named("report-data")
    assert data["title"] == "n0, n1, n2"
    assert [run["label"] for run in data["runs"]] == ["fipo, seed 0", "fipo, seed 1", "fipo, seed 2"]
    assert data["comparison"]["groups"] == [{"label": "fipo", "runs": [0, 1, 2]}]
    assert call(runs[0], "-o", tmp_path / "deep/er.html") == 0
    assert (tmp_path / "deep/er.html").is_file()
    assert not (runs[0] / "report.html").exists()
    with pytest.raises(ValueError, match="is a folder"):
        call(runs[0], "-o", tmp_path)


def test_a_wrong_folder_is_said_before_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="is no folder here"):
        call(tmp_path / "missing")
    run = write_run(tmp_path / "run", training_lines(reward__mean=[0.5]))
    monkeypatch.setattr(page_file, "PAGE", tmp_path)
    for name in ("page.html", "page.css"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="pip install plotly"):
        call(run)
    assert not (run / "report.html").exists()


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run")
    code = (
        "import sys\n"
        "from megatron_fipo.analysis import of_run\n"
        "from megatron_fipo.report import page_file, report_command, report_data, run_data\n"
        f"folder = {str(run)!r}\n"
        "report = report_data.make_report([run_data.read_run(folder)], [of_run.analyse_run(folder)], 100)\n"
        "page_file.safe_json(report.data)\n"
        "print(sorted({'torch', 'megatron', 'transformers', 'plotly', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(megatron_fipo.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_contract_of_a_run(tmp_path: Path) -> None:
    """The shapes that the page's scripts rely on."""
    lines = [
        scores_line(0, 0.2),
        *training_lines(
            reward__mean=[0.0] * 6,
            policy__response_tokens=[10.0] * 6,
            time_s__step=[10.0, 9.0, None, 10, 10, 10],
            time_s__rollout=[6.0, 5.0, 1.0, 6, 6, 6],
            time_s__update=[2.0, 3.0, 1.0, 9, 2, 2],
            secret__metric=[1.0] * 6,
        ),
        scores_line(6, 0.6),
    ]
    problems = {"before_held_out": judged([0, 1], [0, 0]), "after_held_out": judged([1, 1], [0, 0])}
    run = read_run(write_run(tmp_path / "run", lines, problems=problems))
    write_trace(run.folder / "traces", [traced(3)], {})
    data = made(run, 100).data
    (only,) = data["runs"]
    assert only["steps"] == [0, 1, 2, 3, 4, 5, 6]
    assert only["state"] == "finished"
    assert "secret/metric" not in only["metrics"]
    assert all(len(column) == 7 for column in only["metrics"].values())
    assert only["axes"]["tokens"] == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert only["axes"]["flops"] is None
    assert only["time"]["phases"] == ["rollout", "update", "other"]
    assert only["time"]["seconds"][2] == [2.0, 1.0, None, 0.0, 2.0, 2.0, None]
    assert [(one["step"], one["source"], one["k"], one["avg"]) for one in only["evaluations"]] == [
        (0, "held_out", 2, 0.2),
        (6, "held_out", 2, 0.6),
    ]
    assert {point["where"] for point in only["analysis"]["points"]} == {"evaluation", "training"}
    before, after = only["samples"]["before"], only["samples"]["after"]
    assert [one["prompt"] for one in before] == [one["prompt"] for one in after] == ["0+1=", "1+1="]
    assert [(one["is_right"], one["step"]) for one in (before[0], after[0])] == [(False, 0), (True, 6)]
    named = {name for finding in only["verdict"] for name in finding["metrics"]}
    assert named <= only["metrics"].keys()
    sections = {section["id"] for section in data["sections"]}
    assert {figure["section"] for figure in data["figures"]} == sections
    assert only["groups"][0]["responses"][0]["tokens"] in made(run, 100).tokens
    assert np.isfinite(json.loads(safe_json(only))["objective"]["half_life_tokens"])


def test_a_run_without_evaluations_shows_samples_of_training(tmp_path: Path) -> None:
    from megatron_fipo.run.samples import TrainingSample, write_samples

    run = read_run(
        write_run(
            tmp_path / "run", training_lines(reward__mean=[0.5] * 6), {"data.evaluation": {}, "train.num_steps": 6}
        )
    )
    for step in (1, 5):
        sample = TrainingSample(
            **{
                "step": step,
                "source": "chains",
                "prompt_id": 0,
                "sample_index": 0,
                "prompt": "p",
                "response": "r" * 30_000,
            },
            **{"reference": "", "answer": "a", "score": 1.0, "reward": 1.0, "advantage": 0.5, "trained_on": True},
            **{"why_not": "", "tokens": 3, "finish_reason": "stop", "error": "", "created_at_step": step},
        )
        write_samples(run.folder / "samples", step, [sample] * 8)
    shown = made(run, 10).data["runs"][0]["samples"]
    assert [(len(rows), rows[0]["step"], rows[0]["is_right"]) for rows in shown.values()] == [
        (6, 1, True),
        (6, 5, True),
    ]
    assert shown["after"][0]["response"].endswith("… (30000 characters)")
