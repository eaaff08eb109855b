"""Makes a response, and from it a turn, of the parts of a server's answer; parts that do not fit are refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from megatron_fipo.rl.trajectory import policy_segments
from megatron_fipo.rollout.engine import GenerationRequest, Turn
from megatron_fipo.rollout.servers.api import Completion
from megatron_fipo.rollout.servers.http import ServerError, ServerRefusedError


def join_completion(
    url: str,
    token_ids: Sequence[int],
    scored: Sequence[tuple[int, float]],
    finish_reason: Any,
    version_spans: Sequence[tuple[str, int, int]],
    num_cached_tokens: int,
) -> Completion:
    """One response, whole and consistent.

    Args:
        url: the server's address, for the message.
        token_ids: the response.
        scored: (token id, log-prob) as the server lists them beside the response.
        finish_reason: the server's word for it.
        version_spans: (weight version, first token, one past the last); empty ones are left out.
        num_cached_tokens: see `Completion`.

    Raises:
        ServerRefusedError: if tokens, log-probs and weight versions do not cover each other, or the finish reason is
            none of stop, length and abort.
    """
    spans = [span for span in version_spans if span[2] > span[1]]
    covered = [span[1] for span in spans] + [len(token_ids)] == [0] + [span[2] for span in spans]
    same_tokens = [token_id for token_id, _ in scored] == list(token_ids)
    log_probs = [log_prob for _, log_prob in scored]
    are_numbers = all(type(token) is int for token in token_ids) and all(
        type(each) in (int, float) for each in log_probs
    )
    if same_tokens and covered and are_numbers and finish_reason in ("stop", "length", "abort"):
        return Completion(token_ids, log_probs, finish_reason, spans, num_cached_tokens)
    raise ServerRefusedError(
        f"{url} gave {len(token_ids)} tokens, {len(scored)} log-probs, finish_reason {finish_reason!r} and weight "
        f"versions {spans}, which do not belong together",
        200,
    )


def turn_of(request: GenerationRequest, completion: Completion, stop_token_ids: Collection[int]) -> Turn:
    """A server's response as the engine's answer to a request.

    A response that was aborted with its last token written is whole, and says so: nothing could continue it. SGLang's
    scheduler looks whether a request is aborted before it looks at the token that it has just written.

    Args:
        stop_token_ids: tokens that end a response.

    Raises:
        ServerError: if it was generated with weights that no update has brought.
    """
    start = len(request.prefix)
    segments = policy_segments(
        torch.tensor(completion.token_ids, dtype=torch.int64),
        torch.tensor(completion.log_probs, dtype=torch.float32),
        [(_policy_version(version), start + first, start + stop) for version, first, stop in completion.version_spans],
        start,
    )
    return Turn(request, segments, _finish_reason(request, completion, stop_token_ids))


def _finish_reason(request: GenerationRequest, completion: Completion, stop_token_ids: Collection[int]) -> str:
    if completion.finish_reason == "abort" and completion.token_ids:
        if completion.token_ids[-1] in stop_token_ids:
            return "stop"
        if len(request.prefix) + len(completion.token_ids) >= request.sampling.max_tokens:
            return "length"
    return completion.finish_reason


def _policy_version(version: str) -> int:
    if not version.isdecimal():
        raise ServerError(f"a server generated with weights {version!r} that were not handed over by update_weights()")
    return int(version)
