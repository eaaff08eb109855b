"""Lets only requests with the run's key reach a server, and none of web pages. It guards every route of both engines.

SGLang unpickles what is posted to some of its routes, and vLLM, as a trainer needs it, runs any method of its workers.
So whoever can post there has the server's account. Their own API keys leave routes open.

This module uses only the standard library, since it runs inside the servers. What refuses is a plain function, so that
tests and stand-ins can call it.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

KEY_VARIABLE = "MEGATRON_FIPO_SERVER_KEY"
"""The environment variable of a server that holds its key. A command line could be read by everybody on the host."""

LIVENESS = "/health"
"""The guard itself answers this route, also without a key: sglang-router asks for it before it shows the key."""

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


def own_key() -> str:
    """The key of the server that runs in this process.

    Raises:
        RuntimeError: if it was started without one.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise RuntimeError(
            f"{KEY_VARIABLE} is not set: a server takes orders from whoever knows its key, and needs one. Set it to a "
            "long random text before the server is started, and name the trainer's variable in servers.api_key_env."
        )
    return key


def bearer(key: str) -> str:
    """The Authorization header that shows a key."""
    return f"Bearer {key}"


def refusal(headers: Mapping[str, str], address: str, key: str) -> tuple[int, str] | None:
    """Why a request is refused, as (HTTP status, words), or None.

    Args:
        headers: the request's, with names in lower case.
        address: the address of this host at which the request arrived.
        key: this server's key.
    """
    if "origin" in headers:
        return 403, "requests from web pages are refused (this one has an Origin header)"
    if _is_loopback(address) and not _is_loopback(_host_name(headers.get("host", ""))):
        return 403, "the Host header does not name this host: a request over the loopback names 127.0.0.1 or localhost"
    if not hmac.compare_digest(headers.get("authorization", "").encode(), bearer(key).encode()):
        return 401, "the server's key is missing or wrong (Authorization: Bearer …)"
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if has_body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, "the body must be application/json"
    return None


def _host_name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class ServerGuard:
    """ASGI middleware that answers requests that are refused, before their bodies are read.

    Raises:
        RuntimeError: when it is made, if the server has no key.
    """

    def __init__(self, app: _App) -> None:
        self._app, self._key = app, own_key()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            # sglang-router shows the key that it was shown and its own, the same; two different ones are none.
            headers[name] = value if headers.get(name, value) == value else f"{headers[name]},{value}"
        refused = refusal(headers, (scope.get("server") or ("",))[0], self._key)
        if refused is None:
            await self._app(scope, receive, send)
        elif refused[0] == 401 and (scope.get("method"), scope.get("path")) == ("GET", LIVENESS):
            await _answer(send, 200, {})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _answer(send, refused[0], {"error": refused[1]})


async def _answer(send: _Send, status: int, content: Mapping[str, str]) -> None:
    body = json.dumps(content).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*head, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
