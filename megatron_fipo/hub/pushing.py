"""Pushes a finished model to the hub: checks the right to write, makes the model's card, uploads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fipo import __version__
from megatron_fipo.config import Config, without_secrets
from megatron_fipo.hub.client import CONNECT_TIMEOUT_S, end_waits, retried
from megatron_fipo.hub.names import HubError

CARD = "README.md"
_KEY = "checkpoint.push_to_hub"
_LOGIN = "Log in with `hf auth login` and a token that may write, or set HF_TOKEN to one"
_SHOWN = ("avg@", "cons@", "pass@", "response_tokens/mean")


def check_may_push(name: str, *, private: bool = True) -> None:
    """Check, before anything is trained, that there is a token and that it may write the target repository.

    Args:
        private: the value of `checkpoint.hub_private`.

    Raises:
        HubError: if there is no token, it is not valid, it may only read, or it belongs to somebody else; or if the
            repository exists, is public, and should be private.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HTTPError

    owner = name.split("/")[0]
    if get_token() is None:
        raise HubError(f"{_KEY}={name}: there is no token of the Hugging Face hub here. {_LOGIN}.")
    end_waits()
    try:
        account = retried(HfApi().whoami)
    except (HTTPError, OSError, ValueError) as error:  # ValueError: an answer that is no JSON
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise HubError(f"{_KEY}={name}: the hub does not accept this token ({status}). {_LOGIN}.") from error
        raise HubError(
            f"{_KEY}={name}: the hub cannot be asked whether the model may be pushed ({_reason(error)}). Leave the "
            "key empty where there is no connection, and upload the export afterwards."
        ) from error
    if problem := _what_forbids(account, owner, name):
        raise HubError(f"{_KEY}={name}: {problem} {_LOGIN}.")
    try:
        _refuse_public(name, private)
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, HubError):
            raise
        raise HubError(f"{_KEY}={name}: the hub does not say who may read it ({_reason(error)}).") from error


def _refuse_public(name: str, private: bool) -> None:
    """Refuse an existing public repository where the model should be private: `create_repo` would not complain."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not private:
        return
    try:
        info = retried(lambda: HfApi().repo_info(name, timeout=CONNECT_TIMEOUT_S))
    except RepositoryNotFoundError:
        return
    if info.private is False:
        raise HubError(
            f"{_KEY}={name}: this repository exists and is public, and checkpoint.hub_private is true. Make it private "
            "in its settings on the hub, name another, or set checkpoint.hub_private=false."
        )


def push(config: Config, folder: Path, evaluation: Path, origins: Mapping[str, Any]) -> str:
    """Write the model's card beside it and upload the folder. Returns the address.

    Args:
        config: the recorded configuration, with names and commits.
        folder: the export.
        evaluation: the run's folder of scores before and after.
        origins: where the model and the data came from, as in provenance.json.

    Raises:
        HubError: if it cannot be uploaded; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    name, api = config.checkpoint.push_to_hub, HfApi()
    card = model_card(config, _scores(evaluation / "before.json"), _scores(evaluation / "after.json"), origins)
    run = without_secrets(config.run.name)
    end_waits()
    try:
        (folder / CARD).write_text(without_secrets(card), encoding="utf-8")
        _refuse_public(name, config.checkpoint.hub_private)
        api.create_repo(name, private=config.checkpoint.hub_private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"megatron_fipo {__version__}: run {run}")
    except HubError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # an upload's own errors come as RuntimeError
        raise HubError(_reason(error)) from error
    return f"{api.endpoint}/{name}"


def upload_command(config: Config, folder: Path) -> str:
    """The command that uploads the export by hand."""
    private = " --private" if config.checkpoint.hub_private else ""
    return f"hf upload {config.checkpoint.push_to_hub} {folder}{private}"


def model_card(
    config: Config, before: Mapping[str, float], after: Mapping[str, float], origins: Mapping[str, Any]
) -> str:
    """The model's card: what it was made from, how, and its scores. Names no folder or address of this machine."""
    from huggingface_hub import ModelCardData

    model, data = origins.get("model"), origins.get("data") or {}
    base = model["hub"] if model else ""
    sets = sorted({entry["hub"] for key, entry in data.items() if key.startswith("data.train.")})
    metadata = ModelCardData(
        base_model=base or None,
        datasets=sets or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["megatron_fipo", config.algorithm, "reinforcement-learning"],
    )
    base_line = (
        f"[{base}](https://huggingface.co/{base}) at commit {model['commit']}" if model else "a model of one's own"
    )
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {config.checkpoint.push_to_hub.split('/')[1]}",
        "",
        f"Trained by reinforcement learning on verified answers with megatron_fipo {__version__}.",
        "",
        f"- Base model: {base_line}",
        f"- Algorithm: {config.algorithm}, at most {config.train.num_steps} steps of {config.rollout.num_prompts} "
        f"prompts x {config.rollout.num_samples_per_prompt} responses, learning rate "
        f"{config.optimizer.learning_rate:g}",
        *(f"- Data: {_data_line(config, name, data)}" for name in config.data.train),
        "",
        *_table(config, before, after),
    ]
    return "\n".join(lines) + "\n"


def _data_line(config: Config, name: str, origins: Mapping[str, Any]) -> str:
    source, origin = config.data.train[name], origins.get(f"data.train.{name}")
    if origin is not None:
        subset = f", subset {source.subset}" if source.subset else ""
        return f"{name}: {origin['hub']}{subset}, split {source.split}, at commit {origin['commit']}"
    return f"{name}: {source.task or source.kind}"


def _table(config: Config, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    rows = []
    for key, value in after.items():
        name = key.removeprefix("evaluation/")
        if name.split("/", 1)[-1].startswith(_SHOWN) and "_ci95_" not in name:
            rows.append(f"| {name} | {_number(before.get(key))} | {_number(value)} |")
    if not rows:
        return ["The run evaluated on no held-out data."]
    settings = config.evaluation
    return [
        f"Held-out scores, as the run measured them ({settings.num_samples_per_prompt} responses to each problem, "
        f"temperature {settings.temperature:g}, top-p {settings.top_p:g}):",
        "",
        "| | before | after |",
        "|---|---|---|",
        *rows,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _scores(file: Path) -> dict[str, float]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _what_forbids(account: Mapping[str, Any], owner: str, name: str) -> str:
    """Why an account's token may not write a repository; empty where it may, as far as the hub says."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    role, user = token.get("role"), account.get("name")
    if user is None:
        return "the answer names no account, and is perhaps not a hub's (HF_ENDPOINT)."
    if role == "read":
        return "this token may only read."
    if role == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or ()
        may = any(
            (scope.get("entity") or {}).get("name") in (owner, name)
            and "repo.write" in (scope.get("permissions") or ())
            for scope in scopes
        )
        return "" if may else f"this fine-grained token has no permission repo.write for {owner}."
    organisations = {entry.get("name"): entry.get("roleInOrg") for entry in account.get("orgs") or ()}
    if owner != user and owner not in organisations:
        known = ", ".join(str(one) for one in (user, *organisations))
        return f"this token is {user}'s, and may write for {known}, not for {owner}."
    if owner != user and organisations[owner] == "read":
        return f"{user} may only read in {owner}."
    return ""


def _reason(error: Exception) -> str:
    text = str(error.__cause__ or error).strip() or str(error)
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
