"""Models by name: which files are fetched, and how a whole model in the cache is recognised."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_fipo.config import is_hub_name
from megatron_fipo.hub.client import (
    NoAccessError,
    UnreachableError,
    cached_snapshot,
    download,
    missing_in_cache,
    note_commit,
)
from megatron_fipo.hub.names import HubError, Repository

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "LICENSE*",
    "NOTICE*",
)
"""Files that are fetched for a model: configuration, weights, tokenizer, licence; neither code nor pickles."""
LEFT_OUT = ("*/*", "consolidated*")
"""Folders (exports for other programs, original formats), and a second copy of the weights beside the first."""
_FIRST_FILES = ("config.json",)


def model_commit(repository: Repository) -> tuple[str, str]:
    """Return (the commit to read a model at, a line about it for the user or an empty string).

    Where the hub does not answer, or does not let this machine read, a whole model in the cache stands in for it.

    Raises:
        HubError: if neither the hub nor the cache has it.
    """
    if repository.revision is not None and repository.is_pinned:
        return repository.revision, ""
    try:
        return note_commit(repository, _FIRST_FILES), ""
    except (UnreachableError, NoAccessError) as error:
        folder = cached_model(repository)
        if folder is None:
            raise
        reason = "cannot be reached" if isinstance(error, UnreachableError) else "gives no access"
        return folder.name, (
            f"{repository.key}={repository.name}: the hub {reason}; taken from its cache, at commit {folder.name}"
        )


def fetch_model(repository: Repository, commit: str) -> Path:
    """The folder of a model at a commit, fetched where the cache lacks it.

    Raises:
        HubError: if it cannot be fetched, or holds no weights in safetensors.
    """
    folder = cached_model(repository, commit)
    if folder is None:
        folder = download(repository, MODEL_FILES, commit=commit, ignore=LEFT_OUT)
    if problem := _what_is_missing(folder):
        raise HubError(
            f"{repository.key}={repository.name}: {problem} at commit {commit}. A model needs config.json, a tokenizer "
            "and weights in safetensors; pickled weights (*.bin, *.pt) are not fetched, since reading them runs code."
        )
    return folder


def cached_model(repository: Repository, commit: str | None = None) -> Path | None:
    """The folder of a whole model in the cache; None if there is none. Sends no request to the hub."""
    folder = cached_snapshot(repository, MODEL_FILES, commit=commit, ignore=LEFT_OUT)
    return None if folder is None or _what_is_missing(folder) else folder


def model_folder(path: str, revision: str | None = None, key: str = "model.path") -> str:
    """The folder of a model that is given by folder or by name: for commands of one process.

    Raises:
        HubError: for a name that neither the hub nor its cache has.
    """
    if not is_hub_name(path):
        if revision:
            raise HubError(revision_without_name(path, revision))
        return path
    repository = Repository(key, path, revision=revision)
    commit, _ = model_commit(repository)
    return str(fetch_model(repository, commit))


def model_config_folder(path: str, revision: str | None) -> str:
    """A folder that holds the model's config.json, fetched alone where the cache lacks it: for plans of a run."""
    if not is_hub_name(path):
        return path
    repository = Repository("model.path", path, revision=revision)
    cached = cached_snapshot(repository, _FIRST_FILES)
    if cached is not None and (cached / "config.json").is_file():
        return str(cached)
    return str(download(repository, _FIRST_FILES, commit=note_commit(repository, _FIRST_FILES)))


def cached_folder(path: str, revision: str | None) -> str | None:
    """The folder of a model given by folder or by name; None if it is not on this machine. Sends no request."""
    if not is_hub_name(path):
        return path if Path(path).is_dir() else None
    cached = cached_model(Repository("model.path", path, revision=revision))
    return None if cached is None else str(cached)


def revision_without_name(path: str, revision: str) -> str:
    """The message about a revision that is given together with a folder."""
    return (
        f"model.revision={revision}: model.path={path} is a folder or a path, and only a name on the hub has "
        "revisions. Remove model.revision, or give a name (owner/name) of which no part is a folder here."
    )


def would_download(repository: Repository) -> str:
    """The message about a model that is not in the cache, for commands that fetch nothing."""
    return f"{missing_in_cache(repository)}\nA run would fetch it from the hub."


def _what_is_missing(folder: Path) -> str:
    """The reason why a folder is not a whole model; empty if it is one."""
    if not (folder / "config.json").is_file():
        return "there is no config.json"
    if not (folder / "tokenizer_config.json").is_file():
        return "there is no tokenizer_config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return f"{index.name} is no index of weights ({error!r})"
        absent = sorted(str(name) for name in files if not (folder / str(name)).is_file())
        return f"{len(absent)} of {len(files)} files of weights are missing, such as {absent[0]}" if absent else ""
    return "" if any(folder.glob("*.safetensors")) else "there are no weights in safetensors"
