"""A Slurm cluster of two nodes on this machine, for trying: started, used by a command, taken down.

    python workflow/slurm_try.py [--accounting] [--cpus 8] COMMAND ...
    python workflow/slurm_try.py make benchmark PROFILE=smoke CLUSTER=slurm

Debian and Ubuntu: apt-get install slurmctld slurmd slurm-client munge, for --accounting slurmdbd and
mariadb-server, too. Everything lies in a temporary folder and belongs to who calls this. The nodes share this
machine's cores and say that each has `--cpus` of them: what runs there is tried, not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("node1", "node2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun")
FOR_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db")
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"  # where Debian puts daemons
MEMORY = 16_000  # MB that a node says it has
PATIENCE = 60  # seconds for a daemon to answer
SRUN = """\
#!/bin/sh
# Snakemake's plugin slurm-jobstep (0.6.1) drops SLURM_CONF from what it starts
SLURM_CONF={conf} exec {srun} "$@"
"""
SLURM = """\
ClusterName=try
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# a job of a failed node waits for its credential to expire: 2 minutes by default
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# without control groups, which a container may not change
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# a job that no node can run is refused, it would wait for ever
EnforcePartLimits=ALL
# a killed node is missed after seconds, and its jobs run again elsewhere
SlurmdTimeout=10
KillWait=2
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory={memory}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory={memory}
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[3]}
AccountingStoragePass={folder}/munge.socket
"""
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[3]}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""


class TryError(RuntimeError):
    """The cluster cannot be started; the message says what is missing or where to look."""


class Cluster:
    """A running cluster: `environment` is what its users need; `kill` makes a node fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        path = f"{folder}/bin{os.pathsep}{PATH}"
        self.environment = os.environ | {"SLURM_CONF": str(self.conf), "PATH": path}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *command: str, **environment: str) -> None:
        """Start a daemon in the foreground; what it says goes to NAME.out."""
        with open(self.folder / f"{name}.out", "ab") as said:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment | environment, stdout=said, stderr=said, start_new_session=True
            )

    def ask(self, *command: str) -> str:
        """What a command of Slurm's answers; empty after a failure."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def kill(self, node: str) -> None:
        """SIGKILL a node's daemon and all that runs on it, as if its power had failed."""
        self._kill(f"SLURM_TRY_NODE={node}")  # first who would tell that a job failed
        self._kill(f"SLURMD_NODENAME={node}")

    def take_down(self) -> None:
        """End everything that was started here or by its users."""
        self._kill()
        for daemon in self.daemons.values():
            daemon.kill()
            daemon.wait()

    def _kill(self, *variables: str) -> None:
        """SIGKILL every process of the cluster with these variables, until none is left."""
        wanted = {variable.encode() for variable in (f"SLURM_CONF={self.conf}", *variables)}
        left = True
        while left:
            left = False
            for file in Path("/proc").glob("[0-9]*/environ"):
                # of a process that has ended nothing can be read; slurmstepd writes its title over the begin
                with contextlib.suppress(OSError):
                    if wanted <= set(file.read_bytes().split(b"\0")):
                        os.kill(int(file.parent.name), signal.SIGKILL)
                        left = True


def missing(accounting: bool = False) -> list[str]:
    """The programs that are not installed."""
    wanted = PROGRAMS + (FOR_ACCOUNTING if accounting else ())
    return [name for name in wanted if shutil.which(name, path=PATH) is None]


@contextlib.contextmanager
def cluster(*, accounting: bool = False, cpus: int = 8) -> Iterator[Cluster]:
    """Two nodes with so many processors each, ready for jobs; taken down at the end."""
    if absent := missing(accounting):
        packages = "slurmctld slurmd slurm-client munge" + " slurmdbd mariadb-server" * accounting
        raise TryError(f"not installed: {', '.join(absent)}; Debian, Ubuntu: apt-get install {packages}")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as place:
        running = Cluster(Path(place))
        try:
            _configure(running, accounting, cpus)
            _start(running, accounting)
            yield running
        finally:
            running.take_down()


def _configure(running: Cluster, accounting: bool, cpus: int) -> None:
    values = {
        "folder": running.folder,
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "nodes": NODES,
    }
    values |= {"cpus": cpus, "memory": MEMORY, "ports": _free_ports(4)}
    files = {"slurm.conf": SLURM + ACCOUNTING * accounting, "slurmdbd.conf": SLURMDBD}
    for name, text in files.items():
        file = running.folder / name
        file.touch(0o600)
        file.write_text(text.format_map(values))
    srun = running.folder / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(conf=running.conf, srun=shutil.which("srun", path=PATH)))
    srun.chmod(0o700)
    key = running.folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(running: Cluster, accounting: bool) -> None:
    folder = running.folder
    files = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    running.start("munged", "munged", "--foreground", "--force", f"--key-file={folder}/munge.key", *files)
    _until(running, "munged", lambda: (folder / "munge.socket").exists())
    if accounting:
        _start_database(running)
        running.start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(folder / "database.socket"))
        _until(running, "slurmdbd", lambda: running.ask("sacctmgr", "-i", "add", "cluster", "try"))
    running.start("slurmctld", "slurmctld", "-D", "-f", str(running.conf))
    for node in NODES:
        running.start(node, "slurmd", "-D", "-N", node, "-f", str(running.conf), SLURM_TRY_NODE=node)
    idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
    _until(running, "slurmctld", lambda: running.ask(*idle).split() == list(NODES))


def _start_database(running: Cluster) -> None:
    data, user = running.folder / "database", getpass.getuser()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": running.environment}
    install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}"]
    if subprocess.run([*install, "--auth-root-authentication-method=normal"], **quiet).returncode != 0:
        raise TryError(f"{' '.join(install)} failed: run it yourself to see why")
    address = f"{running.folder}/database.socket"
    options = [
        "--no-defaults",
        f"--datadir={data}",
        f"--user={user}",
        f"--socket={address}",
        "--skip-networking",
    ]
    running.start("mariadbd", "mariadbd", *options, "--skip-grant-tables")
    _until(running, "mariadbd", lambda: Path(address).exists())


def _until(running: Cluster, name: str, condition) -> None:
    end = time.time() + PATIENCE
    while not condition():
        if time.time() > end or running.daemons[name].poll() is not None:
            said = [*running.folder.glob(f"{name}.out"), *running.folder.glob(f"{name}.log")]
            lines = [line for file in said for line in file.read_text(errors="replace").splitlines()[-8:]]
            raise TryError("\n".join([f"{name} did not start:", *lines]))
        time.sleep(0.2)


def main(arguments: list[str]) -> int:
    """Run a command on such a cluster; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accounting", action="store_true", help="with a database, so that sacct answers")
    parser.add_argument("--cpus", type=int, default=8, help="that each node says it has (8)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run there")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("a command is needed, such as: make benchmark PROFILE=smoke CLUSTER=slurm")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # takes the cluster down, too
    try:
        with cluster(accounting=options.accounting, cpus=options.cpus) as running:
            return subprocess.run(options.command, env=running.environment).returncode
    except TryError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
