"""vLLM's command line and answers that no healthy server gives. The real server is in tests/engines."""

from __future__ import annotations

import asyncio
import copy
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_fipo.config import ConfigError, load_config, validate
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams
from megatron_fipo.rollout.servers import plugins
from megatron_fipo.rollout.servers.api import Completion, LaunchSpec
from megatron_fipo.rollout.servers.http import ServerConnection, ServerRefusedError
from megatron_fipo.rollout.servers.vllm.client import VllmServer, _continued_seed
from megatron_fipo.rollout.servers.vllm.launch import VllmAdapter
from tests.models import save_random_model

REQUEST = GenerationRequest("sample", 0, 0, (5, 6, 7), SamplingParams(8), seed=1)
ANSWER: dict[str, Any] = {
    "model": "weights-7",
    "usage": {"prompt_tokens_details": {"cached_tokens": 2}},
    "choices": [
        {
            "token_ids": [8, 1],
            "finish_reason": "stop",
            "weight_versions": [
                {"version": "default", "start": 0, "end": 1},
                {"version": "8", "start": 1, "end": 2},
                {"version": "9", "start": 2, "end": 2},
            ],
            "logprobs": {"content": [{"token_id": 8, "logprob": -0.5}, {"token_id": 1, "logprob": -2.0}]},
        }
    ],
}


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    sizes = {"hidden_size": 128, "max_position_embeddings": 2048}  # four layers, two key-value heads of 32
    return LaunchSpec(
        python="/env/bin/python",
        model_path=save_random_model(tmp_path, **sizes),
        host="127.0.0.1",
        port=1234,
        dtype="bfloat16",
        weight_version="7",
        tp=2,
        cpu_cores=((0, 1), (2,)),
        max_total_tokens=1000,
    )


def option(command: tuple[str, ...], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_command_line_follows_the_spec(spec: LaunchSpec) -> None:
    plan = VllmAdapter().launch_plan(replace(spec, extra_args=("--max-num-seqs", "3")))
    assert plan.command[0] == "/env/bin/python"
    assert Path(plan.command[1]).name == "vllm_cpu_launcher.py"
    assert Path(plan.command[1]).exists()
    assert plan.command[-2:] == ("--max-num-seqs", "3"), "the user has the last word"
    # Eight blocks of 128 tokens for 1,000, one empty; keys and values of one head each of 32 in two bytes, four layers.
    assert option(plan.command, "--kv-cache-memory-bytes") == str(9 * 128 * 2 * 4 * 32 * 2)
    assert option(plan.command, "--max-model-len") == "1000", "no sequence may be longer than the cache"
    assert option(plan.command, "--served-model-name") == "weights-7"
    assert "--enforce-eager" in plan.command
    assert plan.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2"
    path = plan.environment["PYTHONPATH"]
    assert path is not None
    assert [entry.name for entry in Path(path).iterdir() if entry.is_dir() and entry.name != "__pycache__"] == [
        "megatron_fipo_vllm"
    ], "nothing else of the trainer's is visible in the server"


def test_on_gpus_memory_can_be_released(spec: LaunchSpec) -> None:
    spec = replace(
        spec, device="cuda", gpus=("4", "6"), max_total_tokens=None, releases_memory=True, memory_fraction=0.4
    )
    plan = VllmAdapter().launch_plan(spec)
    assert plan.command[:3] == ("/env/bin/python", "-m", "vllm.entrypoints.openai.api_server")
    assert "--enable-sleep-mode" in plan.command
    assert "--enforce-eager" not in plan.command
    assert "--max-model-len" not in plan.command
    assert option(plan.command, "--gpu-memory-utilization") == "0.4"
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "4,6"
    with pytest.raises(ValueError, match=r"servers\.placement=colocated: vLLM cannot release its memory on the CPU"):
        VllmAdapter().launch_plan(replace(spec, device="cpu"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.top_p=0.9", "rollout.top_p=0.9: vLLM gives log-probs that are renormalised"),
        ("rollout.temperature=0.005", "rollout.temperature=0.005: vLLM samples at 0, or between 0.01 and 2"),
        ("evaluation.temperature=2.5", "evaluation.temperature=2.5: vLLM samples"),
    ],
)
def test_the_configuration_refuses_sampling_that_vllm_changes(override: str, words: str) -> None:
    sound = ["model.path=m", "data.train.a.kind=chain_arithmetic", "data.train.a.verifier=chain_arithmetic"]
    validate(load_config(None, [*sound, "rollout.engine=vllm"]))
    validate(load_config(None, [*sound, "rollout.engine=sglang", override]))
    with pytest.raises(ConfigError, match=re.escape(words)):
        validate(load_config(None, [*sound, "rollout.engine=vllm", override]))


def test_a_continued_response_draws_other_numbers() -> None:
    seeds = [_continued_seed(5, length) for length in range(100)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert _continued_seed(6, 3) != seeds[3] == _continued_seed(5, 3)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "(Worker pid=1) ERROR 11-22 02:21:56 [multiproc_executor.py:1063] ValueError: too little memory\n"
            "(EngineCore pid=2) ERROR 11-22 02:21:56 [core.py:1510] RuntimeError: Worker failed with error 'too …\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "ValueError: too little memory",
        ),
        (
            "(APIServer pid=1) WARNING 11-22 02:21:29 [utils.py:2] fd limit errors like `OSError: [Errno 24]`\n"
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Model architectures ['X'] are not supported for now.\n"
            "    For further information visit nowhere\n",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, Model architectures ['X'] are not supported for now.",
        ),
        (
            "(EngineCore pid=2) ERROR 11-22 02:21:56 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried\n",
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
        ),
        ("one\ntwo\nthree\nfour\nfive\nsix\n", "two\nthree\nfour\nfive\nsix"),
        ("RuntimeError: Engine core initialization failed.", "RuntimeError: Engine core initialization failed."),
    ],
)
def test_the_reason_of_an_exit_is_the_first_cause(log: str, words: str) -> None:
    assert VllmAdapter().reason_of_exit(log) == words


def ask(spec: LaunchSpec, route: str, answer: Any, method: str, *arguments: Any) -> Any:
    """Call a client's method against a server that gives one answer to one route."""

    async def run() -> Any:
        async def reply(_: web.Request) -> web.Response:
            return web.json_response(answer)

        application = web.Application()
        application.router.add_post(route, reply)
        async with TestServer(application) as server, aiohttp.ClientSession() as session:
            client = VllmServer(ServerConnection(session, str(server.make_url("/"))), spec)
            return await getattr(client, method)(*arguments)

    return asyncio.run(run())


def generate(spec: LaunchSpec, answer: Any) -> Completion:
    completion = ask(spec, "/inference/v1/generate", answer, "generate", REQUEST, "id", [1], 10.0)
    assert isinstance(completion, Completion)
    return completion


def test_an_answer_is_read(spec: LaunchSpec) -> None:
    completion = generate(spec, ANSWER)
    assert completion == Completion([8, 1], [-0.5, -2.0], "stop", [("7", 0, 1), ("8", 1, 2)], 2)
    attached = generate(replace(spec, weight_version="3"), ANSWER | {"model": "/models/somebody's"})
    assert attached.version_spans[0] == ("3", 0, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": None}, "2 tokens, 0 log-probs"),
        ({"token_ids": [8, 2]}, "do not belong together"),
        ({"token_ids": [8]}, "1 tokens, 2 log-probs"),
        ({"finish_reason": "error"}, "finish_reason 'error'"),
        ({"weight_versions": [{"version": "8", "start": 1, "end": 2}]}, r"weight versions \[\('8', 1, 2\)\]"),
        ({"logprobs": {"content": [{"token_id": 8, "logprob": -9999.0}, {"token_id": 1, "logprob": 0.0}]}}, "not fin"),
        ({"finish_reason": "length"}, "2 of up to 8 tokens after 3: its context is full"),
    ],
)
def test_an_answer_that_is_not_whole_is_refused(spec: LaunchSpec, changes: dict[str, Any], words: str) -> None:
    answer = copy.deepcopy(ANSWER)
    answer["choices"][0].update(changes)
    with pytest.raises(ServerRefusedError, match=words):
        generate(spec, answer)


def test_no_answer_is_refused(spec: LaunchSpec) -> None:
    for answer in ({"choices": []}, "a text", None):
        with pytest.raises(ServerRefusedError, match="gave no response"):
            generate(spec, answer)


def test_one_ranks_failure_is_told(spec: LaunchSpec) -> None:
    answer = {"results": [{"value": None}, {"error": "ValueError: no such file"}]}
    with pytest.raises(ServerRefusedError, match="rank 1, fipo_load_folder: ValueError: no such file"):
        ask(spec, "/collective_rpc", answer, "load_folder", Path("/folder"), 10.0)


def test_checksums_of_another_number_of_ranks_are_refused(spec: LaunchSpec) -> None:
    with pytest.raises(ServerRefusedError, match=r"has 1 tensor-parallel ranks; servers\.tp=2"):
        ask(spec, "/collective_rpc", {"results": [{"value": {}}]}, "checksums", 10.0)


def test_a_cache_that_was_not_flushed_is_told(spec: LaunchSpec) -> None:
    with pytest.raises(ServerRefusedError, match="did not forget"):
        ask(spec, "/reset_prefix_cache", {"success": False}, "flush_cache")


def test_a_score_that_lacks_tokens_is_refused(spec: LaunchSpec) -> None:
    answer = {"prompt_logprobs": [None, {"6": {"logprob": -1.5}}]}
    assert ask(spec, "/inference/v1/generate", answer, "score", [[5, 6]], 10.0) == [[-1.5]]
    with pytest.raises(ServerRefusedError, match="scored 1 of 2 tokens"):
        ask(spec, "/inference/v1/generate", answer, "score", [[5, 6, 7]], 10.0)


FAKE_SERVER = """
import multiprocessing, sys
import vllm.distributed.utils as utilities

def report():
    import vllm.distributed.utils as utilities
    print("child", utilities.USE_SCHED_YIELD, flush=True)

if __name__ == "__main__":
    print("server", utilities.USE_SCHED_YIELD, *sys.argv[1:], flush=True)
    from vllm.entrypoints.openai.api_server import report
    child = multiprocessing.get_context("spawn").Process(target=report)
    child.start()
    child.join()
"""


@pytest.mark.parametrize("flag", ["USE_SCHED_YIELD = True", ""])
def test_the_launcher_for_cpus_leaves_time_to_others_in_every_process(tmp_path: Path, flag: str) -> None:
    for file, text in {
        "__init__.py": "",
        "distributed/__init__.py": "",
        "distributed/utils.py": flag,
        "entrypoints/__init__.py": "",
        "entrypoints/openai/__init__.py": "",
        "entrypoints/openai/api_server.py": FAKE_SERVER,
    }.items():
        path = tmp_path / "vllm" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    launcher = Path(plugins.__file__).with_name("vllm_cpu_launcher.py")
    command = [sys.executable, str(launcher), "--port", "1"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    if flag:
        assert result.stdout.splitlines() == ["server False --port 1", "child False"], result.stderr
    else:
        assert result.returncode == 1
        assert "has no USE_SCHED_YIELD" in result.stderr
