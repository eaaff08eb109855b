"""What keeps strangers from servers: the guard before every route, sealed calls, and handles that are no pickles."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from megatron_fipo.rollout.servers.plugins import server_guard
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm import transport
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.sealed import seal, unseal
from megatron_fipo.rollout.servers.plugins.server_guard import KEY_VARIABLE, ServerGuard, refusal

KEY = "a-long-random-text"
TORCHS_ARGUMENTS = inspect.signature(reductions.rebuild_cuda_tensor).parameters
GOOD = {
    "host": "127.0.0.1:3000",
    "authorization": f"Bearer {KEY}",
    "content-type": "application/json",
    "content-length": "2",
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"content-type": "application/json; charset=utf-8"}, None),
        ({"content-length": "0", "content-type": ""}, None),
        ({"host": "localhost:3000"}, None),
        ({"host": "[::1]:3000"}, None),
        ({"authorization": ""}, (401, "missing or wrong")),
        ({"authorization": "Bearer a-long-random-tex"}, (401, "missing or wrong")),
        ({"authorization": f"Bearer {KEY} "}, (401, "missing or wrong")),
        ({"authorization": f"Basic {KEY}"}, (401, "missing or wrong")),
        ({"authorization": f"Bearer {KEY}é"}, (401, "missing or wrong")),
        ({"origin": "http://127.0.0.1:3000"}, (403, "web pages")),
        ({"origin": "null"}, (403, "web pages")),
        ({"host": "evil.example:3000"}, (403, "does not name this host")),
        ({"host": "127.0.0.1.evil.example"}, (403, "does not name this host")),
        ({"host": ""}, (403, "does not name this host")),
        ({"content-type": "text/plain"}, (415, "must be application/json")),
        ({"content-type": "application/x-www-form-urlencoded"}, (415, "must be application/json")),
        ({"content-type": ""}, (415, "must be application/json")),
        ({"content-type": "", "content-length": "0", "transfer-encoding": "chunked"}, (415, "must be")),
    ],
)
def test_who_is_refused(changes: dict[str, str], expected: tuple[int, str] | None) -> None:
    headers = {name: value for name, value in (GOOD | changes).items() if value or name == "host"}
    found = refusal(headers, "127.0.0.1", KEY)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found[0] == expected[0]
        assert expected[1] in found[1]
        assert KEY not in found[1]


def test_a_server_on_the_network_has_any_name() -> None:
    assert refusal(GOOD | {"host": "node7.cluster:3000"}, "10.0.0.7", KEY) is None


def ask(scope: Mapping[str, Any], headers: list[tuple[bytes, bytes]]) -> tuple[list[Any], list[str]]:
    """What the guard sends, and whether the application behind it was asked. Reading the body fails the test."""
    sent: list[Any] = []
    asked: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["type"])

    async def receive() -> Any:
        raise AssertionError("the body of what is refused is not read")

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {"type": "http", "method": "POST", "path": "/x", "server": ("127.0.0.1", 3000), "headers": headers, **scope}
    asyncio.run(ServerGuard(application)(whole, receive, send))
    return sent, asked


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.title().encode(), value.encode()) for name, value in headers.items()]


def test_the_guard_stands_before_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert ask({}, raw(GOOD)) == ([], ["http"])
    sent, asked = ask({}, raw(GOOD | {"authorization": "Bearer no"}))
    assert (sent[0]["status"], asked) == (401, [])
    assert "missing or wrong" in json.loads(sent[1]["body"])["error"]
    assert ask({}, [*raw(GOOD), (b"authorization", GOOD["authorization"].encode())]) == ([], ["http"]), "shown twice"
    assert ask({}, [*raw(GOOD), (b"authorization", b"Bearer no")])[0][0]["status"] == 401, "one of two keys is wrong"
    assert ask({"type": "websocket"}, raw({"host": "localhost"}))[0] == [{"type": "websocket.close", "code": 1008}]
    assert ask({"type": "lifespan"}, [])[1] == ["lifespan"]
    assert ask({"method": "OPTIONS"}, raw(GOOD | {"origin": "http://evil"}))[0][0]["status"] == 403, "no preflight"


def test_that_it_lives_is_told_to_all_but_web_pages_and_by_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    here = {"host": "127.0.0.1:3000"}
    alive = {"method": "GET", "path": "/health"}
    sent, asked = ask(alive, raw(here))
    assert (sent[0]["status"], sent[1]["body"], asked) == (200, b"{}", [])
    assert ask(alive, raw(here | {"origin": "http://evil"}))[0][0]["status"] == 403
    for other in ({"method": "POST"}, {"path": "/health_generate"}, {"path": "/health/"}):
        assert ask(alive | other, raw(here))[0][0]["status"] == 401


def test_a_server_without_a_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(KEY_VARIABLE, value)
        with pytest.raises(RuntimeError, match=f"{KEY_VARIABLE} is not set"):
            ServerGuard(lambda scope, receive, send: asyncio.sleep(0))


# --- sealed calls -----------------------------------------------------------------------------------------------------


def test_a_sealed_call_arrives_as_it_was_sent() -> None:
    arguments = [[{"bytes": "AAAA"}], "ü", 3, None]
    assert unseal(KEY, "load", json.loads(json.dumps(seal(KEY, "load", arguments)))) == arguments


@pytest.mark.parametrize(
    ("key", "method", "spoil"),
    [
        ("another", "load", lambda text, code: [text, code]),
        (KEY, "checksums", lambda text, code: [text, code]),
        (KEY, "load", lambda text, code: [text.replace("1", "2"), code]),
        (KEY, "load", lambda text, code: [text, code[:-1]]),
        (KEY, "load", lambda text, code: [text]),
        (KEY, "load", lambda text, code: []),
        (KEY, "load", lambda text, code: [[1], code]),
        (KEY, "load", lambda text, code: [text, None]),
        (KEY, "load", lambda text, code: [text, code, "more"]),
        (KEY, "load", lambda text, code: [text, "é"]),
    ],
)
def test_a_call_that_was_not_sealed_so_is_refused(key: str, method: str, spoil: Any) -> None:
    with pytest.raises(PermissionError, match=f"{method} was called without this server's key") as refused:
        unseal(key, method, spoil(*seal(KEY, "load", [1])))
    assert key not in str(refused.value)


# --- handles to memory on a GPU ---------------------------------------------------------------------------------------


def handle(**changes: Any) -> tuple[Any, ...]:
    """What torch says of 16 bytes on a GPU, the device left out."""
    named = {
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size([16]),
        "tensor_stride": (1,),
        "tensor_offset": 32,
        "storage_cls": type(torch.zeros(1)._typed_storage()),
        "dtype": torch.uint8,
        "storage_device": None,
        "storage_handle": bytes(range(66)),
        "storage_size_bytes": 64,
        "storage_offset_bytes": 512,
        "requires_grad": False,
        "ref_counter_handle": b"/torch_1_2_3",
        "ref_counter_offset": 8,
        "event_handle": b"\xff" * 64,
        "event_sync_required": True,
    }
    assert list(named) == list(TORCHS_ARGUMENTS), "torch names them so"
    return tuple((named | changes).values())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments with which memory was opened, in a process that sees two GPUs."""
    found: list[Any] = []

    def rebuild(*arguments: Any) -> torch.Tensor:
        found.extend(arguments)
        return torch.arange(16, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(transport.reductions, "rebuild_cuda_tensor", rebuild)
    return found


def test_a_handle_goes_over_json_and_opens_what_it_named(opened: list[Any]) -> None:
    message = json.loads(json.dumps(transport.pack_handle("GPU-1", handle())))
    assert transport.unpack(message, torch.device("cpu")).tolist() == list(range(16))
    assert tuple(opened) == handle(storage_device=1)
    with pytest.raises(ValueError, match="lies on GPU GPU-7; this server sees"):
        transport.unpack(message | {"device": "GPU-7"}, torch.device("cpu"))


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float32}, {"tensor_stride": (2,)}, {"requires_grad": True}, {"storage_cls": dict}]
)
def test_what_is_no_buffer_of_bytes_is_not_sent(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which is not what this transport knows"):
        transport.pack_handle("GPU-1", handle(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "16"}, "size must be a whole number"),
        ({"size": True}, "size must be a whole number"),
        ({"size": -1}, "size must be a whole number"),
        ({"offset": 2**63}, "offset must be a whole number"),
        ({"offset": 49}, "reach beyond its memory of 64"),
        ({"handle": 5}, "handle must be base64"),
        ({"handle": "no base64!"}, "handle must be base64"),
        ({"event": base64.b64encode(bytes(5000)).decode()}, "event has 5000 bytes"),
        ({"sync": 1}, "sync must be true or false"),
        ({"device": ["GPU-1"]}, "its device a text"),
        ({"more": 1}, "a bucket is"),
    ],
)
def test_a_handle_of_another_form_opens_nothing(changes: dict[str, Any], words: str, opened: list[Any]) -> None:
    with pytest.raises(ValueError, match=words):
        transport.unpack(transport.pack_handle("GPU-1", handle()) | changes, torch.device("cpu"))
    assert opened == []


class Attack:
    """A pickle that writes a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self._marker)!r}, 'w').write('executed')",)


@pytest.mark.parametrize("name", ["cuda_ipc", "bytes", "handle", "device"])
def test_a_pickle_in_a_message_is_data(tmp_path: Path, name: str, opened: list[Any]) -> None:
    marker = tmp_path / "marker"
    payload = pickle.dumps(Attack(marker))
    pickle.loads(payload)
    assert marker.read_text() == "executed", "it would, where it is unpickled"
    marker.unlink()
    text = base64.b64encode(payload).decode()
    message = {
        "cuda_ipc": {"cuda_ipc": text, "device": "GPU-1"},
        "bytes": {"bytes": text},
        "handle": transport.pack_handle("GPU-1", handle()) | {"handle": text},
        "device": transport.pack_handle("GPU-1", handle()) | {"device": text},
    }[name]
    try:
        arrived = transport.unpack(message, torch.device("cpu"))
    except ValueError:
        assert name in ("cuda_ipc", "device")
    else:
        assert name == "handle" or bytes(arrived.tolist()) == payload
    assert not marker.exists()


def test_nothing_of_the_plugins_unpickles() -> None:
    folder = Path(server_guard.__file__).parent
    sources = {file.name: file.read_text(encoding="utf-8") for file in folder.rglob("*.py")}
    assert "transport.py" in sources
    for words in ("import pickle", "torch.load(", "marshal", "eval(", "exec("):
        assert [name for name, source in sources.items() if words in source] == []
