"""When a run looks whether it may push its model, and when it pushes: on the first rank, all others waiting."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from megatron_fipo.config import Config
from megatron_fipo.console.console import Console
from megatron_fipo.hub.names import HubError
from megatron_fipo.hub.pushing import check_may_push, push, upload_command
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.waiting import Work
from megatron_fipo.run.folder import RunFolder
from megatron_fipo.run.named_on_hub import NamedRun


def check_before_run(config: Config, world: ProcessGroup) -> None:
    """Refuse a run that could not push its model at its end. Collective over all ranks.

    Raises:
        HubError: on every rank.
    """
    if not config.checkpoint.push_to_hub:
        return
    problem = ""
    with Work(world, "asking the Hugging Face hub whether the model may be pushed"):
        if world.rank() == 0:
            try:
                check_may_push(config.checkpoint.push_to_hub, private=config.checkpoint.hub_private)
            except HubError as error:
                problem = str(error)
    problem = exchange.all_gather_objects(problem, world)[0]
    if problem:
        raise HubError(problem)


def push_after_run(named: NamedRun, folder: RunFolder, world: ProcessGroup, console: Console) -> str:
    """Push the exported model, where the configuration says so. Collective over all ranks.

    A push that fails is told and does not make the run a failure: all that was trained is on the disk, and a scheduler
    that started the run again and again would help nobody. The same command tries again when its owner wants it to.

    Returns:
        The model's address, on the first rank; empty where there is none.
    """
    config, address = named.recorded, ""
    if not config.checkpoint.push_to_hub:
        return ""
    with Work(world, "pushing the model to the Hugging Face hub"):
        if world.rank() == 0:
            try:
                address = push(config, folder.huggingface, folder.evaluation, named.origins)
            except HubError as error:
                console.warning(
                    f"THE MODEL IS NOT ON THE HUB: checkpoint.push_to_hub={config.checkpoint.push_to_hub} failed "
                    f"({error}). It is whole in {folder.huggingface}; the same command tries again, and this uploads "
                    "it:"
                )
                console.command("upload by hand:", upload_command(config, folder.huggingface))
    return address
