"""JSON over HTTP to one server, with errors that tell apart what may be asked again from what may not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from megatron_fipo.rollout.servers.plugins.server_guard import bearer
from megatron_fipo.system.text_hygiene import clean_text

ANSWER_BYTES = 32 * 2**20
"""Limit on an answer where the caller knows no better one: more than the checksums of the largest model take."""
_ERROR_BYTES = 2**16
"""Bytes that are read of an error's answer."""
_WORDS_LIMIT = 2000
"""Characters of a server's own words that an error quotes."""
_NESTED_WORDS = 8
"""Depth to which a message nested within an error's answer is looked for."""
_KEY_REMEDY = "For a server in servers.urls, servers.api_key_env must name the variable that holds its key."


class ServerError(RuntimeError):
    """A server did not do what it was asked; the message names its address, the route and the reason.

    Much of it is in the server's words: what would move a terminal's cursor, or cannot be written, is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(clean_text(message))


class ServerUnreachableError(ServerError):
    """No whole answer came: refused or broken connection, time-out, an answer cut short, a gateway without a worker."""


class ServerRefusedError(ServerError):
    """The server answered, and said no, in its own words."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerConnection:
    """A server's address and the session over which requests to it are sent.

    Args:
        session: shared by all servers; made on the event loop that awaits the calls.
        url: http://host:port.
        is_gateway: whether a router answers there, whose errors from 500 on are those of reaching a worker.
        key: shown with every request; "" for a server that asks for none.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, *, is_gateway: bool = False, key: str = "") -> None:
        self.session, self.url, self._is_gateway = session, url.rstrip("/"), is_gateway
        self.shows_key = bool(key)
        """Whether requests bear a key."""
        # Nothing compressed: the limit on an answer's length is one on the bytes that arrive.
        self._headers = {"Accept-Encoding": "identity"} | ({"Authorization": bearer(key)} if key else {})

    async def post(self, route: str, body: Any = None, *, timeout_s: float, longest_answer: int = ANSWER_BYTES) -> Any:
        """POST a JSON body ({} if None) and return the decoded answer; None for an empty one, text if not JSON.

        Args:
            longest_answer: limit in bytes; an answer is refused as soon as it has become longer.
        """
        return await self._request("POST", route, {} if body is None else body, timeout_s, longest_answer)

    async def get(self, route: str, *, timeout_s: float) -> Any:
        """GET a route and return the decoded answer."""
        return await self._request("GET", route, None, timeout_s, ANSWER_BYTES)

    async def _request(self, method: str, route: str, body: Any, timeout_s: float, longest_answer: int) -> Any:
        place = f"{self.url}{route}"
        try:
            async with self.session.request(
                method,
                place,
                json=body,
                headers=self._headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                status = response.status
                raw = await _read(response, place, longest_answer if status < 300 else _ERROR_BYTES)
        except TimeoutError as error:
            raise ServerUnreachableError(f"{place} did not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachableError(f"{place} could not be asked: {reason}") from error
        text = raw.decode(errors="replace")
        if status in (502, 503, 504) or (status >= 500 and self._is_gateway):
            raise ServerUnreachableError(f"{place} answered {status}: {_own_words(text)}")
        if status in (401, 403):
            raise ServerRefusedError(f"{place} answered {status}: {_own_words(text)}. {_KEY_REMEDY}", status)
        if status >= 400:
            raise ServerRefusedError(f"{place} answered {status}: {_own_words(text)}", status)
        if status >= 300:
            raise ServerRefusedError(f"{place} answered {status}: a redirection, which is not followed", status)
        return _decoded(text, place, status)


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Refuse an answer that lacks what is read from it in this context, or has it in another form.

    Args:
        place: names the server that answered, for the message.

    Raises:
        ServerRefusedError: naming what was missing.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ServerRefusedError(
            f"{place} gave an answer of a form that is not known here ({type(error).__name__}: {str(error)[:200]})",
            200,
        ) from error


async def _read(response: aiohttp.ClientResponse, place: str, longest: int) -> bytes:
    """The whole body of an answer, or the beginning of an error's.

    Raises:
        ServerRefusedError: if it is longer, or compressed.
    """
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise ServerRefusedError(f"{place} answered in {encoding[:20]!r}, which it was not asked for", response.status)
    parts, num_bytes = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        num_bytes += len(part)
        if num_bytes <= longest:
            continue
        if response.status >= 300:
            break
        raise ServerRefusedError(
            f"{place} gave more than the {longest} bytes that its answer can have; the rest was not read", 200
        )
    return b"".join(parts)[:longest]


def _decoded(text: str, place: str, status: int) -> Any:
    try:
        return json.loads(text) if text else None
    except json.JSONDecodeError:
        return text
    except (RecursionError, ValueError) as error:  # a thousand brackets, an integer of 5,000 digits
        raise ServerRefusedError(f"{place} gave an answer that cannot be read: {error}", status) from error


def _own_words(text: str) -> str:
    """The message within a server's error answer."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()[:_WORDS_LIMIT] or "(no words)"
    for _ in range(_NESTED_WORDS):
        inner = None
        if isinstance(content, dict):
            inner = next((content[key] for key in ("error", "message", "detail") if content.get(key)), None)
        if inner is None:
            break
        content = inner
    return (content if isinstance(content, str) else json.dumps(content))[:_WORDS_LIMIT]
