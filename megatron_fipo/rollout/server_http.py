"""JSON over HTTP to one server, with errors that tell apart what may be asked again from what may not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp

_WORDS_LIMIT = 2000
"""Characters of a server's own words that an error quotes."""


class ServerError(RuntimeError):
    """A server did not do what it was asked; the message names its address, the route and the reason."""


class ServerUnreachableError(ServerError):
    """No whole answer came: refused or broken connection, time-out, an answer cut short, a gateway without a worker."""


class ServerRefusedError(ServerError):
    """The server answered, and said no, in its own words."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerConnection:
    """A server's address and the session over which it is spoken to.

    Args:
        session: shared by all servers; made on the event loop that awaits the calls.
        url: http://host:port.
        is_gateway: whether a router answers there, whose errors from 500 on are those of reaching a worker.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, *, is_gateway: bool = False) -> None:
        self.session, self.url, self._is_gateway = session, url.rstrip("/"), is_gateway

    async def post(self, route: str, body: Any = None, *, timeout_s: float) -> Any:
        """POST a JSON body ({} if None) and return the decoded answer; None for an empty one, text if not JSON."""
        return await self._request("POST", route, {} if body is None else body, timeout_s)

    async def get(self, route: str, *, timeout_s: float) -> Any:
        """GET a route and return the decoded answer."""
        return await self._request("GET", route, None, timeout_s)

    async def _request(self, method: str, route: str, body: Any, timeout_s: float) -> Any:
        place = f"{self.url}{route}"
        try:
            async with self.session.request(
                method, place, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)
            ) as response:
                text = await response.text()
                status = response.status
        except TimeoutError as error:
            raise ServerUnreachableError(f"{place} did not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            reason = str(error) or type(error).__name__
            raise ServerUnreachableError(f"{place} could not be asked: {reason}") from error
        if status in (502, 503, 504) or (status >= 500 and self._is_gateway):
            raise ServerUnreachableError(f"{place} answered {status}: {_own_words(text)}")
        if status >= 400:
            raise ServerRefusedError(f"{place} answered {status}: {_own_words(text)}", status)
        try:
            return json.loads(text) if text else None
        except json.JSONDecodeError:
            return text


def _own_words(text: str) -> str:
    """The message within a server's error answer."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return text.strip()[:_WORDS_LIMIT] or "(no words)"
    while isinstance(content, dict):
        inner = next((content[key] for key in ("error", "message", "detail") if content.get(key)), None)
        if inner is None:
            break
        content = inner
    return (content if isinstance(content, str) else json.dumps(content))[:_WORDS_LIMIT]
