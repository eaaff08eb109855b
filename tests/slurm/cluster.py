"""A real Slurm on this host: munge, MariaDB, slurmdbd, slurmctld and two slurmd, each a child process.

All files lie in one folder and all ports are its own, so a Slurm that the host may run stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.rollout.servers.process import free_port

PACKAGES = ("munge", "mariadb-server", "slurmctld", "slurmd", "slurm-client", "slurmdbd")
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct")
NODES = ("node1", "node2")
ACCOUNT = "ci"
PARTITION = "debug"
START_TIMEOUT_S = 90.0

SLURM_CONF = """
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=2
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_ports[0]} CPUs={cpus} State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node_ports[1]} CPUs={cpus} State=UNKNOWN
PartitionName={partition} Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
"""cred_expire is also how long a requeued job waits before it may start again: 120 s by default."""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""

DATABASE_SETUP = """
create database slurm_acct_db;
create user 'slurm'@'127.0.0.1' identified by 'slurm';
grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1';
"""


@dataclass(frozen=True)
class Cluster:
    """A running Slurm of two nodes.

    Attributes:
        folder: its configuration, state and logs.
        environment: under which Slurm's commands speak to it.
    """

    folder: Path
    environment: Mapping[str, str]

    def run(self, *command: str, expected: int = 0) -> str:
        """Run a command, such as sacct; its standard output."""
        result = subprocess.run(
            command, env=dict(self.environment), capture_output=True, text=True, check=False, timeout=60
        )
        assert result.returncode == expected, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_search_path()) is None]


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Bring a cluster up in `folder`, and take it down again, with every job that is still there."""
    folder.mkdir(parents=True, exist_ok=True)
    database_port, dbd_port, ctld_port, *node_ports = (free_port() for _ in range(3 + len(NODES)))
    names = {
        "folder": folder,
        "ctld_port": ctld_port,
        "dbd_port": dbd_port,
        "database_port": database_port,
        "node_ports": node_ports,
        "cpus": os.cpu_count(),
        "partition": PARTITION,
    }
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**names))
    (folder / "slurmdbd.conf").write_text(SLURMDBD_CONF.format(**names))
    (folder / "slurmdbd.conf").chmod(0o600)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool.{node}").mkdir()
    environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": _search_path()}
    cluster = Cluster(folder, environment)
    with ExitStack() as stack:
        start = Daemons(folder, environment, stack)
        start.munge()
        start.database(database_port)
        start("slurmdbd", "slurmdbd", "-D")
        start.wait_until(lambda: _succeeds(environment, "sacctmgr", "-n", "list", "cluster"), "slurmdbd")
        for added in (["cluster", "ci"], ["account", ACCOUNT, "cluster=ci"], ["user", "root", f"account={ACCOUNT}"]):
            cluster.run("sacctmgr", "-iQ", "add", *added)
        start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            start(f"slurmd.{node}", "slurmd", "-D", "-N", node)
        start.wait_until(lambda: _num_idle(environment) == len(NODES), "slurmd")
        stack.callback(_cancel_everything, cluster, start)
        yield cluster


class Daemons:
    """Starts daemons as children of this process and ends them in reverse order, by their process ids."""

    def __init__(self, folder: Path, environment: Mapping[str, str], stack: ExitStack) -> None:
        self._folder, self._environment, self._stack = folder, environment, stack
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __call__(self, name: str, *command: str) -> None:
        with (self._folder / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig=TERM", *command],  # ends with the tests, also when they are killed
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = process
        self._stack.callback(self._end, process)

    def munge(self) -> None:
        key, where = self._folder / "munge.key", f"{self._folder}/munge"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        files = [f"--{name}-file={where}.{name}" for name in ("key", "pid", "log", "seed")]
        # --force: root's own folder is as good as the system's, which it would insist on
        self("munge", "munged", "--foreground", "--force", f"--socket={where}.socket", *files)
        self.wait_until(lambda: _succeeds(self._environment, "munge", "-n", f"--socket={where}.socket"), "munge")

    def database(self, port: int) -> None:
        data, where = self._folder / "database", f"--socket={self._folder}/database.socket"
        subprocess.run(
            [
                *("mariadb-install-db", "--user=root", f"--datadir={data}", "--skip-test-db"),
                "--auth-root-authentication-method=socket",
            ],
            env=dict(self._environment),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        options = [f"--port={port}", "--bind-address=127.0.0.1", "--skip-name-resolve", f"--pid-file={data}/pid"]
        # slurmdbd warns of less than these
        options += ["--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900"]
        self("database", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", where, *options)
        self.wait_until(lambda: _succeeds(self._environment, "mariadb-admin", where, "ping"), "database")
        subprocess.run(["mariadb", where, "-e", DATABASE_SETUP], env=dict(self._environment), check=True)

    def wait_until(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait for a daemon; if one of them has died, or it takes too long, show the logs."""
        end = time.monotonic() + START_TIMEOUT_S
        while not is_true():
            died = [name for name, process in self._running.items() if process.poll() is not None]
            if died or time.monotonic() > end:
                logs = {
                    path.name: path.read_text(errors="replace")[-2000:] for path in self._folder.glob("*.[lo][ou]*")
                }
                raise AssertionError(f"{what} did not come up; ended: {died}; logs: {logs}")
            time.sleep(0.1)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cancel_everything(cluster: Cluster, daemons: Daemons) -> None:
    """slurmd leaves the processes of its jobs running when it ends."""
    cluster.run("scancel", "--user=root")
    daemons.wait_until(lambda: not cluster.run("squeue", "-h"), "the end of all jobs")


def _num_idle(environment: Mapping[str, str]) -> int:
    command = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"]
    result = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    return len(result.stdout.split())


def _succeeds(environment: Mapping[str, str], *command: str) -> bool:
    return subprocess.run(command, env=dict(environment), capture_output=True, check=False).returncode == 0


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
