"""A run's model and data by their names on the hub: one commit for all ranks, fetched once on each node."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch.distributed import ProcessGroup

from megatron_fipo.config import Config, DataSourceConfig, is_hub_name, without_secrets
from megatron_fipo.hub.client import current_commit
from megatron_fipo.hub.datasets import dataset_commit, fetch_source, source_repository
from megatron_fipo.hub.models import cached_model, fetch_model, model_commit, revision_without_name
from megatron_fipo.hub.names import HubError, Repository
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.waiting import Work
from megatron_fipo.system.disk import DiskError


@dataclass(frozen=True)
class NamedRun:
    """A configuration with what it names on the hub.

    Attributes:
        local: the configuration with folders and files of this machine in the names' places: what is read.
        recorded: the configuration with the names, and commits as their revisions: what is written down and compared.
        origins: the revision asked for and the commit of each name, for provenance.json.
        notes: what the user should know, a line each.
    """

    local: Config
    recorded: Config
    origins: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_Problem: TypeAlias = tuple[type[HubError] | type[DiskError], str] | None
"""An error that stops a rank: its kind and its message."""


@dataclass(frozen=True)
class _Commit:
    """A name on the hub, with what it stands for in this run."""

    name: str
    asked: str | None
    commit: str


def resolve_for_run(config: Config, world: ProcessGroup, say: Callable[[str], None]) -> NamedRun:
    """Find the commits and fetch the files. Collective over all ranks; downloads are waited for, not timed out.

    The first rank asks the hub, so that all train on the same commit; a run that goes on keeps the commit that it began
    with. Then each node's first rank fetches into that node's cache.

    Args:
        say: shows a line before something that may take long.

    Raises:
        HubError: on every rank, if any of them cannot get what it needs.
        DiskError: on every rank, if one cannot write to the hub's cache.
    """
    names = exchange.all_gather_objects(list(_repositories(config)), world)[0]  # a folder may be here and not there
    if not names:
        if config.model.revision:
            raise HubError(revision_without_name(config.model.path, config.model.revision))
        return NamedRun(config, config)
    is_leader = world.rank() == 0
    found: tuple[dict[str, _Commit], list[str]] = ({}, [])
    problem: _Problem = None
    with Work(world, "asking the Hugging Face hub for the commits of the model and the data"):
        if is_leader:
            try:
                found = _find_commits(config, names)
            except (HubError, DiskError) as error:
                problem = type(error), str(error)
    _raise_everywhere(problem, world)
    commits, notes = exchange.all_gather_objects(found, world)[0]
    local: Config | None = None
    fetches = os.environ.get("LOCAL_RANK", "0") == "0"
    with Work(world, "fetching the model and the data from the Hugging Face hub"):
        if fetches:
            try:
                local = _fetch(config, commits, say)
            except (HubError, DiskError) as error:
                problem = type(error), str(error)
    _raise_everywhere(problem, world)
    by_rank = exchange.all_gather_objects(local, world)
    local = next(there for there in reversed(by_rank[: world.rank() + 1]) if there is not None)
    return NamedRun(local, _recorded(config, commits), _origins(commits), tuple(notes) if is_leader else ())


def _raise_everywhere(problem: _Problem, world: ProcessGroup) -> None:
    """Raise the first rank's problem, on all of them. Collective."""
    for told in exchange.all_gather_objects(problem, world):
        if told is not None:
            kind, message = told
            raise kind(message)


def _repositories(config: Config) -> Iterator[tuple[str, Repository]]:
    """Name of the key, and what it names on the hub."""
    if is_hub_name(config.model.path):
        yield "model", Repository("model.path", config.model.path, revision=config.model.revision)
    for key, source in _sources(config):
        if source.kind == "hub":
            yield key, source_repository(key, source)


def _sources(config: Config) -> Iterator[tuple[str, DataSourceConfig]]:
    for part in ("train", "evaluation"):
        for name, source in getattr(config.data, part).items():
            yield f"data.{part}.{name}", source


def _find_commits(config: Config, names: list[tuple[str, Repository]]) -> tuple[dict[str, _Commit], list[str]]:
    """(commit of each name, lines for the user)."""
    before = _commits_of_earlier_run(config)
    sources = dict(_sources(config))
    commits: dict[str, _Commit] = {}
    notes: list[str] = []
    asked: dict[Repository, str] = {}  # one answer for all sources of a repository: a branch may move in between
    for key, repository in names:
        earlier = before.get(key)
        if earlier is not None and (earlier.name, earlier.asked) == _written(repository.name, repository.revision):
            commits[key] = earlier
            notes += _moved(repository, earlier)
            continue
        same = replace(repository, key="")
        if same not in asked:
            is_model = key == "model"
            asked[same], note = model_commit(repository) if is_model else dataset_commit(repository, sources[key])
            notes += [note] if note else []
        commits[key] = _Commit(repository.name, repository.revision, asked[same])
    return commits, notes


def _moved(repository: Repository, earlier: _Commit) -> list[str]:
    """Say it where a branch stands elsewhere than when the run began; a hub that does not answer says nothing."""
    if repository.is_pinned:
        return []
    try:
        now = current_commit(repository)
    except HubError:  # the run needs nothing of it but what is fetched next, whose errors are not hidden
        return []
    if now == earlier.commit:
        return []
    return [
        f"{repository.key}={repository.name}: {earlier.asked or 'main'} stands at commit {now} now; this run goes on "
        f"with {earlier.commit}, with which it began. A new run (another run.output_dir, or train.resume=false) takes "
        "the new one."
    ]


def _commits_of_earlier_run(config: Config) -> dict[str, _Commit]:
    """Return what the run that is resumed has recorded."""
    file = Path(config.run.output_dir) / "provenance.json"
    if not config.train.resume or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = {"model": content["model"]} if content.get("model") else {}
        entries |= content.get("data") or {}
        return {key: _Commit(entry["hub"], entry["revision"], entry["commit"]) for key, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubError(
            f"{file} cannot be read ({error!r}), and it says at which commits this run began with what it names on "
            "the hub. Mend it, name the commits (model.revision, data.*.revision) and delete it, or start a new run "
            "(another run.output_dir)."
        ) from error


def _fetch(config: Config, commits: Mapping[str, _Commit], say: Callable[[str], None]) -> Config:
    """The configuration with what is on this machine in the names' places."""
    model = config.model
    if "model" in commits:
        repository = Repository("model.path", model.path, revision=model.revision)
        commit = commits["model"].commit
        if cached_model(repository, commit) is None:
            say(f"fetching {model.path} from the Hugging Face hub, at commit {commit}")
        model = replace(model, path=str(fetch_model(repository, commit)))
    fetched = {
        key: fetch_source(key, source, commits[key].commit) for key, source in _sources(config) if key in commits
    }
    return _with_sources(replace(config, model=model), fetched)


def _recorded(config: Config, commits: Mapping[str, _Commit]) -> Config:
    model = replace(config.model, revision=commits["model"].commit) if "model" in commits else config.model
    pinned = {key: replace(source, revision=commits[key].commit) for key, source in _sources(config) if key in commits}
    return _with_sources(replace(config, model=model), pinned)


def _with_sources(config: Config, sources: Mapping[str, DataSourceConfig]) -> Config:
    def part(name: str) -> dict[str, DataSourceConfig]:
        given: dict[str, DataSourceConfig] = getattr(config.data, name)
        return {source: sources.get(f"data.{name}.{source}", value) for source, value in given.items()}

    return replace(config, data=replace(config.data, train=part("train"), evaluation=part("evaluation")))


def _origins(commits: Mapping[str, _Commit]) -> dict[str, Any]:
    entries = {}
    for key, commit in commits.items():
        name, asked = _written(commit.name, commit.asked)
        entries[key] = {"hub": name, "revision": asked, "commit": commit.commit}
    model = entries.pop("model", None)
    return {"model": model, "data": entries}


def _written(name: str, asked: str | None) -> tuple[str, str | None]:
    """A name and its revision as they may stand in files: without secrets."""
    return without_secrets(name), None if asked is None else without_secrets(asked)
