"""Data sets by name: which files a subset's split consists of, by the data set's card or by the names of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from yaml import YAMLError

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.hub.client import (
    NoAccessError,
    UnreachableError,
    cached_snapshot,
    current_commit,
    download,
    list_files,
    missing_in_cache,
    note_commit,
    pinned,
)
from megatron_fipo.hub.names import HubError, Repository

CONVERTED = "refs/convert/parquet"
"""Branch on which the hub keeps a data set's rows as parquet, whatever its own files are."""
CARD = "README.md"
_FIRST_FILES = (CARD, ".gitattributes")
_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl"}
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in a file's path that say its split, where the card says nothing; the convention of the hub's own viewer."""


@dataclass(frozen=True)
class FetchedSource(DataSourceConfig):
    """A source of kind hub whose files are here.

    Attributes:
        files: paths on this machine, in the order of their rows.
    """

    files: tuple[str, ...] = ()


def source_repository(key: str, source: DataSourceConfig) -> Repository:
    """The repository of a source of kind hub."""
    return Repository(f"{key}.path", source.path, "dataset", source.revision)


def dataset_commit(repository: Repository, source: DataSourceConfig) -> tuple[str, str]:
    """Return (the commit to read a data set at, a line about it for the user or an empty string).

    Where its own files are neither parquet nor jsonl, that is a commit of the branch with the hub's conversion.

    Raises:
        HubError: if neither the hub nor the cache has it, or it has no such subset or split.
    """
    if repository.revision is not None and repository.is_pinned:
        return repository.revision, ""
    try:
        commit = note_commit(repository, _FIRST_FILES)
        files = list_files(repository, commit)
        if repository.revision is None and not any(Path(file).suffix in _SUFFIXES for file in files):
            converted = pinned(repository, CONVERTED)
            commit = _converted_commit(converted)
            return commit, (
                f"{repository.key}={repository.name}: holds neither parquet nor jsonl files; read from the hub's "
                f"conversion ({CONVERTED})"
            )
        return commit, ""
    except (UnreachableError, NoAccessError) as error:
        folder = _cached_with_files(repository)
        if folder is None:
            raise
        _select_cached(repository, folder, source)
        reason = "cannot be reached" if isinstance(error, UnreachableError) else "gives no access"
        return folder.name, (
            f"{repository.key}={repository.name}: the hub {reason}; taken from its cache, at commit {folder.name}"
        )


def _converted_commit(converted: Repository) -> str:
    try:
        return note_commit(converted, _FIRST_FILES)
    except (UnreachableError, NoAccessError):
        raise
    except HubError as error:
        raise HubError(
            f"{converted.key}={converted.name}: holds neither parquet nor jsonl files, and the hub keeps no conversion "
            f"of it ({CONVERTED}). Convert it, and read it with kind=parquet or kind=jsonl."
        ) from error


def fetch_source(key: str, source: DataSourceConfig, commit: str) -> FetchedSource:
    """A source of kind hub with its files at a commit, fetched where the cache lacks them.

    Raises:
        HubError: if there is no such subset or split, or a file cannot be fetched.
    """
    repository = source_repository(key, source)
    try:
        current_commit(pinned(repository, commit))  # fails at once without a connection; listing would retry
        listed = list_files(repository, commit)
        folder = download(repository, (CARD,), commit=commit) if CARD in listed else None
        chosen = choose_files(repository, listed, _card(folder), source)
        folder = download(repository, chosen, commit=commit)
    except (UnreachableError, NoAccessError):
        cached = cached_snapshot(repository, _FIRST_FILES, commit=commit)
        if cached is None:
            raise
        folder, chosen = cached, _select_cached(repository, cached, source)
    values = {item.name: getattr(source, item.name) for item in fields(DataSourceConfig)}
    return FetchedSource(**values, files=tuple(str(folder / file) for file in chosen))


def fetched_here(source: DataSourceConfig, key: str = "data source") -> FetchedSource:
    """A source of kind hub with its files: for commands of one process."""
    if isinstance(source, FetchedSource):
        return source
    repository = source_repository(key, source)
    commit, _ = dataset_commit(repository, source)
    return fetch_source(key, source, commit)


def cached_source(key: str, source: DataSourceConfig) -> FetchedSource | None:
    """A source of kind hub with its files from the cache alone; None if the cache lacks it. Sends no request.

    Raises:
        HubError: if the cached data set lacks the subset, the split or some of its files.
    """
    repository = source_repository(key, source)
    folder = _cached_with_files(repository)
    if folder is None:
        return None
    chosen = _select_cached(repository, folder, source)
    values = {item.name: getattr(source, item.name) for item in fields(DataSourceConfig)}
    return FetchedSource(**values, files=tuple(str(folder / file) for file in chosen))


def would_download(key: str, source: DataSourceConfig) -> str:
    """The message about a data set that is not in the cache, for commands that fetch nothing."""
    return f"{missing_in_cache(source_repository(key, source))}\nA run would fetch it from the hub."


def file_kind(path: str) -> str:
    """jsonl or parquet, by the file's name."""
    return _SUFFIXES[Path(path).suffix]


def choose_files(
    repository: Repository, files: Sequence[str], card: Mapping[str, Any], source: DataSourceConfig
) -> list[str]:
    """The files of a subset's split, in their order.

    Args:
        files: paths of the repository's files.
        card: metadata of the data set's card; empty if it has none.
        source: gives the subset and the split.

    Raises:
        HubError: if there is no such subset or split, saying which there are.
    """
    where = f"{repository.key}={repository.name}"
    usable = [file for file in files if Path(file).suffix in _SUFFIXES]
    if not usable:
        raise HubError(
            f"{where}: holds neither parquet nor jsonl files. Convert it, and read it with kind=parquet or kind=jsonl."
        )
    try:
        subsets = _subsets(usable, card)
    except (AttributeError, KeyError, TypeError) as error:
        raise HubError(
            f"{where}: its card ({CARD}) says in a form of its own which files belong to which split ({error!r}). "
            f"Fetch it, and read the files with kind=parquet or kind=jsonl:\n    {repository.download_command}"
        ) from error
    key = repository.key.removesuffix(".path")
    name = source.subset or _default_subset(subsets, card)
    if name is None:
        raise HubError(f"{where}: has several subsets, {_list(subsets)}. Set {key}.subset to one of them.")
    if name not in subsets:
        raise HubError(f"{key}.subset={name}: {repository.name} has no such subset; it has {_list(subsets)}.")
    splits = {split: found for split, found in subsets[name].items() if found}
    if source.split not in splits:
        of = f"subset {name} of {repository.name}"
        raise HubError(f"{key}.split={source.split}: {of} has no such split; it has {_list(splits)}.")
    chosen = splits[source.split]
    of_one_format = [file for file in chosen if Path(file).suffix == ".parquet"] or chosen
    _check_shards(repository, of_one_format)
    return of_one_format


def _subsets(files: Sequence[str], card: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Files by subset and split."""
    configs = [entry for entry in card.get("configs") or () if isinstance(entry, dict) and "config_name" in entry]
    if configs:
        return {str(entry["config_name"]): _splits_of_card(files, entry) for entry in configs}
    folders = [re.fullmatch(r"([^/]+)/(?:partial-)?([^/]+)/\d+\.parquet", file) for file in files]
    if all(folders):  # the layout of the hub's conversion
        found: dict[str, dict[str, list[str]]] = {}
        for match in folders:
            assert match is not None
            found.setdefault(match[1], {}).setdefault(match[2], []).append(match[0])
        return found
    return {"default": _splits_by_name(files)}


def _splits_of_card(files: Sequence[str], entry: Mapping[str, Any]) -> dict[str, list[str]]:
    folder = str(entry.get("data_dir") or "").strip("/")
    inside = [file for file in files if not folder or file.startswith(f"{folder}/")]
    given = entry.get("data_files")
    if given is None:
        return _splits_by_name(inside)
    if isinstance(given, dict):
        given = [{"split": split, "path": path} for split, path in given.items()]
    elif isinstance(given, str) or all(isinstance(item, str) for item in given):
        given = [{"split": "train", "path": given}]
    splits: dict[str, list[str]] = {}
    for item in given:
        patterns = [item["path"]] if isinstance(item["path"], str) else list(item["path"])
        patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        found = [file for pattern in patterns for file in files if _glob(pattern).fullmatch(file)]
        splits[str(item["split"])] = list(dict.fromkeys(found))
    return splits


def _splits_by_name(files: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for file in files:
        shard = re.fullmatch(r"(?:.*/)?([A-Za-z0-9_.]+)-\d{5}-of-\d{5}\.\w+", file)
        words = [
            split
            for split, names in _SPLIT_WORDS.items()
            if re.search(rf"(?:^|[^A-Za-z])(?:{'|'.join(names)})(?:[^A-Za-z]|$)", file, re.IGNORECASE)
        ]
        split = words[-1] if words else shard[1] if shard else "train"
        splits.setdefault(split, []).append(file)
    return splits


def _default_subset(subsets: Mapping[str, Any], card: Mapping[str, Any]) -> str | None:
    marked = [str(entry["config_name"]) for entry in card.get("configs") or () if entry.get("default") is True]
    if marked or len(subsets) == 1:
        return marked[0] if marked else next(iter(subsets))
    return "default" if "default" in subsets else None


def _glob(pattern: str) -> re.Pattern[str]:
    """Regular expression for a glob pattern of the card: * stays within a folder, ** does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./"))
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            words.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part)) for part in parts
        )
    )


def _check_shards(repository: Repository, files: Sequence[str]) -> None:
    """Refuse a split of which a shard is missing, where the names of its files say how many there are."""
    shards: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.\w+", file):
            shards.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), there in shards.items():
        if len(there) != count:
            raise HubError(
                f"{repository.key}={repository.name}: of the {count} files {stem}-… only {len(there)} are there. Fetch "
                f"them with\n    {repository.download_command}"
            )


def _cached_with_files(repository: Repository) -> Path | None:
    """The folder of a data set in the cache that holds files of rows: its own, or the hub's conversion of it."""
    candidates = [repository] if repository.revision else [repository, pinned(repository, CONVERTED)]
    for candidate in candidates:
        folder = cached_snapshot(candidate, _FIRST_FILES)
        if folder is not None and any(Path(file).suffix in _SUFFIXES for file in _files_below(folder)):
            return folder
    return None


def _select_cached(repository: Repository, folder: Path, source: DataSourceConfig) -> list[str]:
    """The files of a split in the cache.

    Raises:
        HubError: if the subset, the split or some of its files are not there. The cache may hold only a part of the
            data set; where the card states a number of rows, it is compared.
    """
    files = _files_below(folder)
    card = _card(folder)
    try:
        chosen = choose_files(repository, files, card, source)
        whole = cached_snapshot(repository, chosen, commit=folder.name) is not None
    except HubError as error:
        raise HubError(f"{error}\n(Looked for in the hub's cache, {folder}, which may hold a part of it.)") from error
    expected = _expected_rows(card, source)
    if whole and expected is not None and all(Path(file).suffix == ".parquet" for file in chosen):
        whole = expected == sum(_num_rows(folder / file) for file in chosen)
    if not whole:
        raise HubError(
            f"{repository.key}={repository.name}: the hub's cache, {folder}, lacks a part of split {source.split}. "
            f"Fetch it with\n    {repository.download_command}"
        )
    return chosen


def _expected_rows(card: Mapping[str, Any], source: DataSourceConfig) -> int | None:
    """Rows of the split, as the card counts them; None where it does not."""
    entries = card.get("dataset_info") or ()
    for entry in [entries] if isinstance(entries, dict) else entries:
        if source.subset and entry.get("config_name", "default") != source.subset:
            continue
        for split in entry.get("splits") or ():
            if split.get("name") == source.split and (source.subset or len(entries) == 1 or isinstance(entries, dict)):
                return int(split["num_examples"])
    return None


def _num_rows(path: Path) -> int:
    import pyarrow.parquet as parquet

    return int(parquet.read_metadata(path).num_rows)


def _files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _card(folder: Path | None) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    if folder is None or not (folder / CARD).is_file():
        return {}
    try:
        return metadata_load(folder / CARD) or {}
    except (YAMLError, ValueError) as error:  # ValueError: no mapping, or no UTF-8
        raise HubError(
            f"{folder / CARD}: the metadata of the data set's card cannot be read ({' '.join(str(error).split()):.200})"
            ". Fetch the data set by `hf download`, and read its files with kind=parquet or kind=jsonl."
        ) from error


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"
