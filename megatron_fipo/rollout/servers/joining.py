"""Servers that join a run while it goes on, and leave it, as the run sees them.

At each handover of weights rank 0 reads what is announced and says which of the ranks that own servers takes in which.
One that has come gets the weights of that handover, with checksums and canaries, before its first request. One that has
left, or does not answer, is let go; requests that it had are sent to others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.servers.announced import Announced, AnnouncedServers, share_out
from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.server import State
from megatron_fipo.rollout.servers.specs import device_of
from megatron_fipo.system.digests import fingerprint

logger = logging.getLogger(__name__)

Found = tuple[list[Announced], dict[str, int]]
"""All servers that are announced, and the number of the owner that takes each of them in, by name."""


def why_none_may_join(config: Config) -> str:
    """Why servers cannot join a run with this configuration; "" if they can."""
    section = config.servers
    if config.rollout.engine == "in_process":
        return "rollout.engine=in_process: the run has no servers; set sglang or vllm"
    if section.placement == "colocated":
        return "servers.placement=colocated: such servers take turns with the actor on its own GPUs; set dedicated"
    if section.router:
        return "servers.router=true: the router knows the servers only that the run started with; set it to false"
    if section.weight_sync == "tensor" and device_of(config) == "cuda":
        return (
            "servers.weight_sync=tensor: weights come as memory of the GPUs that the run's own ranks are on; set "
            "distributed or disk"
        )
    return ""


def what_is_served(config: Config) -> dict[str, Any]:
    """What the servers of a run with this configuration have in common."""
    shape = asdict(read_model_shape(config.model.path))
    del shape["max_position_embeddings"]
    return {
        "rollout.engine": config.rollout.engine,
        "model.dtype": config.model.dtype,
        "servers.tp": config.servers.tp,
        "servers.device": device_of(config),
        "shape of model.path": fingerprint(shape)[:8],
    }


class Joining:
    """Finds the servers that join, and takes in those of one rank. Every rank makes one.

    Args:
        announced: the run's folder of announcements.
        config: the run's.
        owner: this rank's number among those that own servers; None if it owns none.
        num_owners: how many do.
        decide: what rank 0 finds, on every rank; collective.
    """

    def __init__(
        self,
        announced: AnnouncedServers,
        config: Config,
        owner: int | None,
        num_owners: int,
        decide: Callable[[Callable[[], Found]], Found],
    ) -> None:
        self._announced, self._config = announced, config
        self._owner, self._num_owners, self._decide = owner, num_owners, decide
        self._owner_of: dict[str, int] = {}
        """Of rank 0: who takes in which server."""
        self._problems: set[str] = set()
        """Of rank 0: what was told of the folder's files already."""
        self._given_up: set[str] = set()
        """Servers that are not taken in again, whatever is announced."""

    def look(self) -> list[Announced]:
        """The servers of this rank's that are announced now. Collective over all ranks."""
        found, owner_of = self._decide(self._find)
        return [server for server in found if owner_of[server.name] == self._owner]

    async def take_in(self, pool: ServerPool, now: Sequence[Announced]) -> None:
        """Take in who is announced and was not before, and let go who is not any more, or is lost.

        Args:
            now: what `look` has found.

        Raises:
            DiskError: if it cannot be written that one was given up.
        """
        announced = {server.name: server for server in now if server.name not in self._given_up}
        there = [server for server in pool.servers if server.may_leave]
        for server in there:
            if server.name in announced and server.state is State.LOST:
                self._give_up(server.name, server.reason, for_good=False)
                del announced[server.name]
            if server.name not in announced:
                why = f": {server.reason}" if server.state is State.LOST else ""
                logger.warning("%s (%s) has left the run%s", server.name, server.client.url, why)
                await pool.leave(server)
        known = {server.name for server in there}
        new = [self._join(pool, server) for name, server in announced.items() if name not in known]
        await asyncio.gather(*new)

    async def _join(self, pool: ServerPool, server: Announced) -> None:
        """Take a server in, or give it up."""
        try:
            self._expect_same(server)
            spec = replace(pool.specs[0], host=server.host, port=server.port, key=server.key, gpus=(), cpu_cores=())
            await pool.join(server.name, spec, lambda: self._announced.is_announced(server.name))
        except ServerError as error:
            logger.warning("%s (http://%s:%d) cannot join the run: %s", server.name, server.host, server.port, error)
            self._give_up(server.name, str(error), for_good=not isinstance(error, ServerUnreachableError))
            return
        logger.warning("%s (http://%s:%d) joins the run", server.name, server.host, server.port)

    def _expect_same(self, server: Announced) -> None:
        """
        Raises:
            ServerError: if it serves something else than this run's servers.
        """
        ours = what_is_served(self._config)
        different = [
            f"{key} {server.serves.get(key)!r}, the run's servers {value!r}"
            for key, value in ours.items()
            if server.serves.get(key) != value
        ]
        if different:
            raise ServerError(f"it was started with {'; '.join(different)}. Start it with the run's own configuration.")

    def _give_up(self, name: str, reason: str, *, for_good: bool) -> None:
        self._given_up.add(name)
        self._announced.give_up(name, reason, for_good=for_good)

    def _find(self) -> Found:
        self._announced.set_finished(False)
        found, problems = self._announced.read()
        for problem in problems:
            if problem not in self._problems:
                logger.warning("%s", problem)
        self._problems |= {*problems}
        self._owner_of = share_out(found, self._owner_of, self._num_owners)
        return found, self._owner_of
