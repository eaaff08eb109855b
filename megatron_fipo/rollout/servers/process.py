"""A server's process: started with a guard, logged to a file, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from megatron_fipo.rollout.servers import process_guard
from megatron_fipo.rollout.servers.api import LaunchPlan

_LOG_TAIL_BYTES = 65536
_TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)$|MASTER_(ADDR|PORT)$|TORCHELASTIC_")
_SYSTEMS_OWN = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that Linux gives to whoever connects, or listens on any port."""
_FIRST, _LAST, _FEWEST = 10240, 65535, 1000
"""Ports for servers lie between the first two, where that leaves so many."""
_given: set[int] = set()
"""Ports that this process has given out."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on at this moment, another one in each call.

    A server listens some seconds after its port was chosen. So that nothing takes it in between, it is none of those
    that the system gives to connections of all kinds, unless these are nearly all.
    """
    try:
        low, high = map(int, _SYSTEMS_OWN.read_text().split())
    except OSError:  # no Linux
        low, high = 32768, 65535
    ports = [*range(_FIRST, min(low, _LAST + 1)), *range(max(high + 1, _FIRST), _LAST + 1)]
    if len(ports) >= _FEWEST:
        for port in random.SystemRandom().sample(ports, k=len(ports)):
            if port not in _given and is_free(host, port):
                _given.add(port)
                return port
    with socket.socket() as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there at this moment."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


class ServerProcess:
    """One running server.

    It ends with this process, however that ends, and takes its own children along, its temporary files, and what it
    held in /dev/shm.

    Args:
        plan: command line and environment.
        log: file that its output is appended to.
        grace_s: time between SIGTERM and SIGKILL when it is ended.

    Raises:
        FileNotFoundError: if its interpreter does not exist.
    """

    def __init__(self, plan: LaunchPlan, log: Path, grace_s: float = 2.0) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        # With torchrun's variables a server would try to join the trainer's process group.
        environment = {name: value for name, value in os.environ.items() if not _TORCHRUN.match(name)}
        for name, value in plan.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        if not os.access(plan.command[0], os.X_OK):
            raise FileNotFoundError(
                f"servers.python={plan.command[0]} is not an executable file. Name the interpreter that has the "
                "inference engine installed."
            )
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", process_guard.__file__, str(grace_s), *plan.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        assert self._guard.stdout is not None, "Popen was given stdout=PIPE"
        line = self._guard.stdout.readline()
        self.pid = int(line) if line.strip() else None
        """The server's own process; None if it could not even be started."""

    @property
    def exit_status(self) -> int | None:
        """The exit status, 128 + n after signal n; None while it runs."""
        return self._guard.poll()

    def log_tail(self) -> str:
        """The end of what it has written since it was started."""
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")

    def ask_to_end(self) -> None:
        """Begin to end it."""
        assert self._guard.stdin is not None, "Popen was given stdin=PIPE"
        self._guard.stdin.close()

    def kill(self) -> None:
        """Take it down at once, also where it hangs, and wait until it is gone."""
        if self.exit_status is None and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
                os.kill(self.pid, signal.SIGKILL)  # the guard takes care of what it started
        self.ask_to_end()
        self.wait()

    def wait(self) -> None:
        """Wait until it and everything that it started are gone."""
        self._guard.wait()
        assert self._guard.stdout is not None, "Popen was given stdout=PIPE"
        self._guard.stdout.close()
