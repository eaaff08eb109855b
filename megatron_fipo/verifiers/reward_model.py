"""A reward model behind an HTTP URL as a verifier: `verifier: http://host:8000/score`.

Request: POST, Content-Type application/json, UTF-8, one object
    {"prompt": the prompt as the model saw it, "response": text, "reference": the data source's reference}.
Answer: status 200 and an object
    {"score": number in [0, 1], 1 is correct; "answer": text, optional, for majority votes}.
Everything else becomes a verdict with an error, never a wrong answer: a score outside [0, 1], another status, an answer
that is cut short or does not come in time. A redirect is an error, too, because following it would send a request
without the body to another address. Requests whose connection fails or that get status 429, 500, 502, 503 or 504 are
made up to `NUM_ATTEMPTS` times.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from megatron_fipo.verifiers.verdict import JobVerifier, Verdict, VerifierJob, score_remedy

NUM_ATTEMPTS = 3
"""Number of requests for one response."""

ATTEMPT_SHARE = 0.25
"""Share of the verifier's time-out that is the socket time-out of one request; the rest is for the pauses between."""

_PAUSE_SHARE = 0.05
_RETRIED_STATUSES = (429, 500, 502, 503, 504)
_MAX_ANSWER_BYTES = 2**20
_MAX_SHOWN_CHARACTERS = 200


class RewardModelError(RuntimeError):
    """The reward model gave no usable answer."""


def without_secrets(url: str) -> str:
    """A URL for messages, without its query, user and password, which may contain keys.

    A text that is no URL is only shortened.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("?")[0][:_MAX_SHOWN_CHARACTERS]
    host = parts.netloc.rpartition("@")[2]
    shown = f"{parts.scheme}://{host}{parts.path}" if parts.scheme else parts.path
    return shown[:_MAX_SHOWN_CHARACTERS] + "?…" * bool(parts.query)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an HTTPError instead of following it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Return None: do not follow."""


class RewardModel(JobVerifier):
    """A verifier that asks the server at a URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._shown = without_secrets(url)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Ask the server for its verdict.

        Raises:
            RewardModelError: if it gives none; the message names the URL and the last failure.
            TypeError: for a reference that JSON cannot express.
        """
        body = json.dumps({"prompt": job.prompt_text, "response": job.response_text, "reference": job.reference})
        failure = ""
        for attempt in range(NUM_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_SHARE * timeout_s * attempt)
            try:
                return self._verdict(self._post(body.encode(), ATTEMPT_SHARE * timeout_s))
            except urllib.error.HTTPError as error:
                failure = _status(error)
                if error.code not in _RETRIED_STATUSES:
                    break
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                failure = str(getattr(error, "reason", None) or error or type(error).__name__)
        # A library's message may contain the URL, too.
        failure = failure.replace(self._url, self._shown)
        raise RewardModelError(f"reward model at {self._shown} did not answer ({attempt + 1} requests): {failure}")

    def _post(self, body: bytes, timeout_s: float) -> bytes:
        request = urllib.request.Request(
            self._url, data=body, headers={"Content-Type": "application/json; charset=utf-8"}, method="POST"
        )
        with self._opener.open(request, timeout=timeout_s) as answer:
            content: bytes = answer.read(_MAX_ANSWER_BYTES + 1)
            if answer.status != 200:
                raise RewardModelError(f"reward model at {self._shown} answered with status {answer.status}, not 200")
            # Announced bytes that never came: http.client does not report them if read() is given an amount.
            missing = 0 if len(content) > _MAX_ANSWER_BYTES else getattr(answer, "length", None) or 0
        if missing:
            raise http.client.HTTPException(f"the answer was cut short: {missing} of its bytes are missing")
        return content

    def _verdict(self, content: bytes) -> Verdict:
        said = f"reward model at {self._shown} answered {content[:_MAX_SHOWN_CHARACTERS]!r}"
        if len(content) > _MAX_ANSWER_BYTES:
            raise RewardModelError(f"{said} and more than {_MAX_ANSWER_BYTES} bytes")
        try:
            answer: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RewardModelError(f"{said}, which is not JSON") from error
        score = answer.get("score") if isinstance(answer, dict) else None
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            raise RewardModelError(f"{said}; it answers an object with a score in [0, 1]")
        if not 0.0 <= score <= 1.0:
            raise RewardModelError(f"{said}; it answers an object with a score in [0, 1]. {score_remedy(score)}")
        return Verdict(float(score), str(answer.get("answer") or ""))


def _status(error: urllib.error.HTTPError) -> str:
    text = f"status {error.code} {error.reason}"
    location = error.headers.get("Location") if error.headers is not None else None
    if 300 <= error.code < 400:
        to = f" to {without_secrets(location)}" if location else ""
        return f"{text}, a redirect{to}, which is not followed. Give the verifier's URL as the one that answers itself"
    return text
