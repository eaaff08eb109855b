"""The command line: commands that run, errors that explain, imports that stay away."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import megatron_fipo
from megatron_fipo import cli
from megatron_fipo.config import load_config
from megatron_fipo.evaluation import chat
from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.in_process.engine import InProcessEngine
from tests.models import save_random_model

CHARACTERS = "0123456789+-=;?#é"
CONFIG = """
run: {name: tiny, output_dir: OUT}
model: {path: MODEL}
data:
  train: {sums: {kind: chain_arithmetic, verifier: chain_arithmetic}}
  evaluation: {held_out: {kind: chain_arithmetic, verifier: chain_arithmetic, num_prompts: 3, seed: 1}}
rollout: {max_response_tokens: 12}
evaluation: {num_samples_per_prompt: 2}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 20 tokens with a tokenizer of single characters."""
    folder = save_random_model(tmp_path_factory.mktemp("model"))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS, "<unk>", "é"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out")))
    return path


def test_help_imports_next_to_nothing_and_validate_no_torch(config: Path) -> None:
    code = f"""
import sys
from contextlib import suppress
from megatron_fipo import cli

for command in ([], *([name] for name in cli.COMMANDS)):
    with suppress(SystemExit):
        cli.main([*command, "--help"])
    loaded = {{"torch", "transformers", "megatron", "omegaconf"}} & set(sys.modules)
    assert not loaded, (command, loaded)
assert cli.main(["validate", {str(config)!r}]) == 0
assert not {{"torch", "transformers", "megatron"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("show this help message and exit") == len(cli.COMMANDS) + 1


def test_a_mistyped_command_is_told_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, nearest in {"trian": "train", "evalute": "evaluate", "sample": "samples", "certfy": "certify"}.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([typed, "run.yaml"])
        assert stop.value.code == 2
        assert (
            f"there is no command {typed!r}. Did you mean {nearest!r}? Known: init, train, " in capsys.readouterr().err
        )
    with pytest.raises(SystemExit):
        cli.main(["xyzzy"])
    assert "there is no command 'xyzzy'. Known: init" in capsys.readouterr().err


def test_validate_prints_what_load_config_reads_back(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.num_steps=7", "algorithm=dapo"]
    assert cli.main(["validate", str(config), overrides[0], "--world-size", "1", overrides[1]]) == 0
    printed = config.with_name("printed.yaml")
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(config, overrides)


def test_validate_refuses_what_cannot_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(config), "parallel.cp=2", "--world-size", "3"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("megatron-fipo validate: ")
    for count in ("0", "-1", "two"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["validate", str(config), "--world-size", count])
    capsys.readouterr()
    assert cli.main(["validate", str(config), "train.num_step=5"]) == 2
    assert "train.num_steps" in capsys.readouterr().err
    assert cli.main(["validate", str(config), "parallel.tp=3"]) == 2
    assert "num_attention_heads=4" in capsys.readouterr().err


def test_validate_loads_verifiers_of_ones_own_from_beside_the_configuration(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_FIPO_VERIFIER_FOLDERS", "")
    (config.parent / "beside_it.py").write_text("def verify(response, reference): return 1.0\n")
    name = next(iter(load_config(config).data.train))
    assert cli.main(["validate", str(config), f"data.train.{name}.verifier=beside_it:verify"]) == 0
    capsys.readouterr()
    assert cli.main(["validate", str(config), f"data.train.{name}.verifier=beside_it:verfy"]) != 0
    error = capsys.readouterr().err
    assert f"data.train.{name}.verifier: verifier 'beside_it:verfy'" in error
    assert "Did you mean 'beside_it:verify'?" in error
    assert "Traceback" not in error


def test_validate_says_that_a_configuration_is_valid(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", str(config)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == f"{config} is valid"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=/not/here"], "model.path=/not/here is no folder here"),
        (
            ["data.train.mine={kind: jsonl, path: /not/here.jsonl, verifier: math}"],
            "data.train.mine.path=/not/here.jsonl does not exist",
        ),
    ],
)
def test_validate_looks_for_files(
    config: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert cli.main(["validate", str(config), *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert "--files-elsewhere" in said.err
    assert cli.main(["validate", str(config), *overrides, "--files-elsewhere"]) == 0
    said = capsys.readouterr()
    assert f"warning: {message}" in said.err
    assert said.err.endswith("is valid, as far as that can be told here\n")


def test_only_the_configuration_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert capsys.readouterr().err.endswith("error: the following arguments are required: CONFIG\n")


def test_version_and_the_list_of_conversions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"megatron-fipo {megatron_fipo.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    listed = " ".join(capsys.readouterr().out.split())
    for name, what in {
        "hf-to-megatron": "Write a Hugging Face folder as a Megatron checkpoint",
        "megatron-to-hf": "Write a Megatron checkpoint (torch_dist) as a Hugging Face folder",
        "verify": "Check a Hugging Face folder",
    }.items():
        assert f"{name} {what}" in listed


@pytest.mark.parametrize("extra", [["--no-such-option"], ["no", "--prompt"]])
def test_unknown_arguments_are_refused(model: Path, capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["chat", str(model), *extra])
    assert stop.value.code == 2
    assert "argument" in capsys.readouterr().err


def test_train_hands_its_arguments_on(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    module = ModuleType("megatron_fipo.train")
    module.main = lambda argv: calls.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_fipo.train", module)
    assert cli.main(["train", str(config), "train.num_steps=2", "parallel.cp=1"]) == 3
    assert calls == [[str(config), "train.num_steps=2", "parallel.cp=1"]]


def test_evaluate_writes_problems_and_metrics(config: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(config), "evaluation.temperature=1.0", "--model", str(model)]
    arguments.append("train.num_minibatches=3")  # does not divide the batch, and nothing is trained
    assert cli.main(arguments) == 0
    folder = config.parent / "out" / "evaluation"
    first = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert [len(row["correct"]) for row in first] == [2, 2, 2]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["evaluation/held_out/problems/count"] == 3
    assert metrics["evaluation/held_out/errors/count"] == 0
    assert metrics["evaluation/held_out/avg@2"] == pytest.approx(sum(row["avg@2"] for row in first) / 3)
    assert "held_out/avg@2" in capsys.readouterr().out
    # Again: the same random numbers, the same responses.
    assert cli.main([*arguments, "--output", str(config.parent / "again")]) == 0
    again = [json.loads(line) for line in (config.parent / "again" / "problems.jsonl").read_text().splitlines()]
    assert again == first


def test_evaluate_without_evaluation_data(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    config.write_text("\n".join(line for line in text.splitlines() if not line.startswith("  evaluation:")))
    assert cli.main(["evaluate", str(config)]) == 2
    assert "data.evaluation is empty" in capsys.readouterr().err


def test_chat_answers_a_prompt_and_leaves(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(*options: str) -> str:
        assert cli.main(["chat", str(model), "--prompt", "1+2=", "--max-tokens", "16", *options]) == 0
        return capsys.readouterr().out

    first = answer("--seed", "1")
    assert first == answer("--seed", "1")
    assert first.endswith("\n")
    assert 1 < len(first) <= 17
    assert len({answer("--seed", str(seed)) for seed in (2, 3)}) > 1
    assert answer("--temperature", "0", "--seed", "1") == answer("--temperature", "0", "--seed", "2")


ALL_IT_KNOWS = "all that it knows is 0123456789+-=;?#é"


def test_chat_ends_with_its_input_and_survives_what_the_tokenizer_does_not_know(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1+2=\n\nwhat?\n3-1=\n"))
    assert cli.main(["chat", str(model), "--max-tokens", "4", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1] == f"[the model's tokenizer does not know every character of 'what?'; {ALL_IT_KNOWS}]"


def test_chat_refuses_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(tmp_path / "nothing")]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err


def test_a_chat_template_sees_the_turns_before_and_raw_does_not(model: Path) -> None:
    conversations = {}
    for raw in (False, True):
        talk = chat.Chat(model, chat.ChatOptions(max_tokens=3, seed=0, raw=raw), io.StringIO())
        talk.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
        talk.uses_template = bool(talk.tokenizer.chat_template) and not raw
        prompts: list[str] = []
        generate = talk.engine.generate

        async def spy(request, *, on_token, generate=generate, prompts=prompts, talk=talk):  # type: ignore[no-untyped-def]
            prompts.append(talk.tokenizer.decode(list(request.prompt_ids)))
            return await generate(request, on_token=on_token)

        talk.engine.generate = spy
        reply = talk.answer("1+1")
        talk.answer("2+2")
        conversations[raw] = (prompts, reply)
    prompts, reply = conversations[False]
    assert prompts == ["1+1=", f"1+1={reply}=2+2="]
    assert conversations[True][0] == ["1+1", "2+2"]


def test_ctrl_c_ends_an_answer_and_not_the_conversation(model: Path) -> None:
    out = io.StringIO()
    talk = chat.Chat(model, chat.ChatOptions(max_tokens=3, seed=0), out)
    generate = talk.engine.generate
    interrupted = []

    async def once(request, *, on_token):  # type: ignore[no-untyped-def]
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return await generate(request, on_token=on_token)

    talk.engine.generate = once
    talk.loop(["1+1=", "2+2="])
    assert out.getvalue().startswith("\n[interrupted]\n")
    assert len(out.getvalue().splitlines()) == 3


def test_text_is_printed_as_soon_as_its_characters_are_complete() -> None:
    class Utf8Bytes:
        """A byte is a token; an incomplete character decodes to U+FFFD."""

        def decode(self, ids: list[int], **options: object) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    out = io.StringIO()
    printer = chat.TextPrinter(Utf8Bytes(), out)  # type: ignore[arg-type]
    shown = []
    for byte in "aé\nb".encode():
        printer.token(byte)
        shown.append(out.getvalue())
    assert shown == ["a", "a", "aé", "aé\n", "aé\nb"]
    printer.end()
    assert out.getvalue() == "aé\nb\n"


def test_an_interrupted_evaluation_generates_only_what_is_missing(
    config: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["evaluate", str(config), "evaluation.temperature=1.0", "--model", str(model)]
    assert cli.main([*arguments, "--output", str(config.parent / "whole")]) == 0
    original, asked = InProcessEngine.generate, []

    async def counting(self: InProcessEngine, request: GenerationRequest, **keywords: Any) -> Trajectory:
        asked.append(request.sample_id)
        sample = await original(self, request, **keywords)
        if len(asked) == 6 and not keywords.get("on_token"):
            signal.raise_signal(signal.SIGINT)
        return sample

    with monkeypatch.context() as patch:
        patch.setattr(InProcessEngine, "generate", counting)
        assert cli.main([*arguments, "rollout.max_batch_size=2"]) == 3
        folder = config.parent / "out" / "evaluation"
        assert not (folder / "problems.jsonl").exists()
        recorded = sum(file.read_text().count("sample_index") for file in (folder / "responses").rglob("*.jsonl"))
        assert 0 < recorded < 6
        asked.clear()
        asked.extend(["earlier"] * 100)  # no second signal
        assert cli.main([*arguments, "rollout.max_batch_size=2"]) == 0
    assert len(asked) - 100 == 6 - recorded
    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (config.parent / "whole" / "problems.jsonl").read_text().splitlines()]
    assert rows == whole
    # Another setting, other responses: the recorded ones do not count.
    assert cli.main([*arguments, "evaluation.temperature=0.5"]) == 0
    assert [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()] != whole
