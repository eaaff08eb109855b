"""Requests to the hub through huggingface_hub. Checks what came against the hub's checksums; words errors our way."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_fipo.hub.names import HubError, Repository
from megatron_fipo.system.disk import DiskError, disk_error

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for the hub's first answer."""
_CHUNK_BYTES = 2**22
_RETRIED_STATUS = (408, 429)
_PASSING_STATUS = (*_RETRIED_STATUS, 500, 502, 503, 504)
RETRY_WAITS_S = (1.0, 3.0, 9.0)
"""Waits before the hub is asked again, where it does not say how long."""
LONGEST_RETRY_WAIT_S = 60.0
LONGEST_SILENCE_S = 30.0
"""Time without a byte from the hub after which a request is given up; the client then asks again a few times."""
LONGEST_SILENCE_OF_UPLOADS_S = 300.0
"""Limit on silence during uploads, which the hub may have to check before it answers."""
_Answer = TypeVar("_Answer")


class UnreachableError(HubError):
    """The hub gave no answer, or said that it cannot serve now; the cache may stand in for it."""


class NoAccessError(HubError):
    """The hub answered, but refuses to let this machine read, with a token or without; the cache may stand in."""


def current_commit(repository: Repository) -> str:
    """Ask the hub for the commit that a repository's revision points to.

    Raises:
        HubError: if the hub does not say.
    """
    from huggingface_hub import HfApi  # imported where it is needed: it takes half a second

    info = _answer(
        repository,
        lambda: HfApi().repo_info(
            repository.name, repo_type=repository.kind, revision=repository.revision, timeout=CONNECT_TIMEOUT_S
        ),
    )
    assert info.sha is not None
    return str(info.sha)


def note_commit(repository: Repository, first_files: Sequence[str]) -> str:
    """Return `current_commit`, and record it in the cache under the revision's name for runs without a connection."""
    current_commit(repository)  # tells errors apart; the download would silently fall back on the cache
    return download(repository, first_files).name


def list_files(repository: Repository, commit: str) -> list[str]:
    """Paths of all files of a commit, sorted.

    Raises:
        HubError: if the hub does not say.
    """
    from huggingface_hub import HfApi

    return sorted(
        _answer(
            repository,
            lambda: HfApi().list_repo_files(repository.name, repo_type=repository.kind, revision=commit),
        )
    )


def download(
    repository: Repository, patterns: Sequence[str], *, commit: str | None = None, ignore: Sequence[str] = ()
) -> Path:
    """Fetch the files that the hub's cache lacks, and check the new ones.

    Args:
        patterns: patterns of the files to fetch.
        commit: None takes the repository's revision.
        ignore: patterns of files to leave out.

    Returns:
        The snapshot's folder, whose name is the commit.

    Raises:
        HubError: if a file cannot be fetched, or its bytes do not match the hub's checksum.
        DiskError: if the cache cannot be written to.
    """
    from huggingface_hub import snapshot_download

    known = _blobs(repository)
    try:
        folder = _answer(
            repository,
            lambda: snapshot_download(
                repository.name,
                repo_type=repository.kind,
                revision=commit or repository.revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignore),
            ),
        )
    finally:
        # After a failure the files that did arrive stay in the cache, and no later call would check them.
        _check_blobs(repository, sorted(_blobs(repository) - known))
    return Path(folder)


def cached_snapshot(
    repository: Repository, patterns: Sequence[str], *, commit: str | None = None, ignore: Sequence[str] = ()
) -> Path | None:
    """The snapshot's folder in the hub's cache, without a request; None if it is absent or known to lack files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=commit or repository.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignore),
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    return Path(folder)


def _answer(repository: Repository, request: Callable[[], _Answer]) -> _Answer:
    """Call the hub's client, and turn its errors into ours."""
    from huggingface_hub.errors import HTTPError

    end_waits()
    try:
        return retried(request)
    except (HTTPError, OSError) as error:
        raise explained(repository, error) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a page of a login or a proxy, say
        raise UnreachableError(
            f"{repository.key}={repository.name}: the server at {_endpoint()} does not answer like the hub "
            f"({error!r:.200}). Look at what lies between (a proxy, a login page, HF_ENDPOINT), or run\n"
            f"    {repository.download_command}\nwhere there is a connection, and copy its cache here."
        ) from error


@cache
def end_waits() -> None:
    """Let no request of huggingface_hub's client wait for ever: some of its own have no time limit at all."""
    from huggingface_hub import get_session, set_client_factory

    default = get_session()
    kind, hooks = type(default), default.event_hooks
    hooks = {**hooks, "request": [*hooks["request"], _end_wait]}
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=None))


def _end_wait(request: Any) -> None:
    limit_s = LONGEST_SILENCE_S if request.method in ("GET", "HEAD") else LONGEST_SILENCE_OF_UPLOADS_S
    given = request.extensions.get("timeout") or {}
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {name: given.get(name) or limit_s for name in names}


def retried(request: Callable[[], _Answer]) -> _Answer:
    """Repeat a request that the hub says it cannot serve just now: one such answer must not end a run of many nodes.

    The client itself repeats only some of its requests. A request that gets no answer at all is not repeated.
    """
    from huggingface_hub.errors import HTTPError

    for wait_s in RETRY_WAITS_S:
        try:
            return request()
        except (HTTPError, OSError) as error:
            response = getattr(_reason(error), "response", None)
            if getattr(response, "status_code", None) not in _PASSING_STATUS:
                raise
            asked = str(response.headers.get("Retry-After", "")) if response is not None else ""
            time.sleep(min(float(asked), LONGEST_RETRY_WAIT_S) if asked.isdecimal() else wait_s)
    return request()


def _reason(error: Exception) -> Exception:
    """The error, or its cause where its own message only mentions the client's cache."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, (HTTPError, OSError)):
        return error.__cause__
    return error


def explained(repository: Repository, error: Exception) -> HubError | DiskError:
    """Say what an error of huggingface_hub means for those who named the repository, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.errors import RevisionNotFoundError as NoRevisionError

    error = _reason(error)
    kind = repository.kind.replace("dataset", "data set")
    where = f"{repository.key}={repository.name}: "
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{_endpoint()}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
    login = "log in with `hf auth login`, or set HF_TOKEN, on every machine that fetches it"
    if isinstance(error, GatedRepoError):
        return NoAccessError(
            f"{where}{_looked_here(repository)}and on the hub the {kind} is gated: its owners give access on request. "
            f"Ask for it at {page} and {login}; then\n"
            f"    {repository.download_command}"
        )
    if isinstance(error, NoRevisionError):
        return HubError(
            f"{where}the {kind} has no revision {repository.revision or 'main'!r}. Its branches, tags and commits are "
            f"at {page}/tree/main."
        )
    if status == 401:
        return NoAccessError(
            f"{where}{_looked_here(repository)}and the hub answers 401: there is no such {kind}, or it is private and "
            f"{_token_words()}. Look at {page}; where it is private, {login}; then\n    {repository.download_command}"
        )
    if status == 403:
        return NoAccessError(
            f"{where}the hub answers 403: this account or its token may not read the {kind}. Look at {page}, and "
            f"{login}."
        )
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return HubError(f"{where}{_looked_here(repository)}and the hub has no such {kind} (404 at {page}).")
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    elif status is not None:
        reason = f"it answers {status}"
    elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        what = f"{repository.key}={repository.name}: the hub's cache {_cache()}"
        return disk_error(what, error, "what came is not fetched again", place=_cache())
    else:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    if status is not None and status < 500 and status not in _RETRIED_STATUS:
        return HubError(f"{where}the hub refuses: {reason} for {page}.")
    return UnreachableError(
        f"{where}{_looked_here(repository)}and the hub ({_endpoint()}) cannot be reached: {reason}. Where there is a "
        f"connection, run\n    {repository.download_command}\nand copy its cache here (HF_HOME names its folder)."
    )


def missing_in_cache(repository: Repository) -> str:
    """Say where a repository was looked for without asking the hub, and which command fetches it."""
    return (
        f"{repository.key}={repository.name}: {_looked_here(repository)}and nothing was asked of the hub. "
        f"Fetch it with\n    {repository.download_command}"
    )


def _looked_here(repository: Repository) -> str:
    folder = f"no folder {Path(repository.name).absolute()}, " if repository.kind == "model" else ""
    return f"{folder}not whole in the hub's cache ({_cache()}), "


def _endpoint() -> str:
    """The hub's address, without a password that HF_ENDPOINT may contain."""
    from huggingface_hub import constants

    parts = urlsplit(str(constants.ENDPOINT))
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _token_words() -> str:
    from huggingface_hub import get_token

    return "the token here is not valid for it" if get_token() else "there is no token here"


def _blob_folder(repository: Repository) -> Path:
    return _cache() / f"{repository.kind}s--{repository.name.replace('/', '--')}" / "blobs"


def _blobs(repository: Repository) -> set[str]:
    folder = _blob_folder(repository)
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _check_blobs(repository: Repository, names: Sequence[str]) -> None:
    """Compare new files of the cache with their names, which are the hub's checksums: sha256, or git's blob hash."""
    for name in names:
        path = _blob_folder(repository) / name
        if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", name) or not path.is_file():
            continue
        size = path.stat().st_size
        digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != name:
            path.unlink()
            raise HubError(
                f"{repository.key}={repository.name}: a downloaded file of {size} bytes does not match the hub's "
                f"checksum {name[:12]}…, and was deleted from {path.parent}. Start the same command again; if it "
                "happens again, look at what lies between (a proxy, HF_ENDPOINT's mirror, the disk)."
            )


def pinned(repository: Repository, commit: str) -> Repository:
    """The repository at a commit."""
    return replace(repository, revision=commit)
