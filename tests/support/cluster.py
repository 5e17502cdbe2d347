"""A real Slurm cluster of a few nodes on this machine, for the tests: started as root, without systemd or cgroups.

Every node is one slurmd in its own host name, mount and process namespace, so killing the namespace's first process
looks like a power cut to the other nodes. Everything lives in one folder, and every process dies with the process that
started it, even after SIGKILL. Nothing is installed here: `missing()` names what is not installed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "unshare")
CPUS = 4
SILENT_NODE_S = 10
"""Seconds after which the controller counts a silent node as down."""

SETTINGS = {
    "ClusterName": "test",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "MpiDefault": "none",
    "SwitchType": "switch/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0",
    "SlurmdParameters": "config_overrides",
    "ReturnToService": 2,  # a node that comes back takes jobs again
    "MessageTimeout": 10,
    "SlurmdTimeout": SILENT_NODE_S,
    "InactiveLimit": 0,
    "KillWait": 20,  # seconds from TERM to KILL: enough for the test job to save on a busy machine
    "MinJobAge": 3600,  # ended jobs can still be queried
    "PropagateResourceLimits": "NONE",
}

NODE = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
slurmd -D -N "$1" -f "$2/slurm.conf" & wait $!
"""
"""Script of a node's first process. It is not slurmd itself, because process 1 gets only signals that it handles."""


def missing() -> str | None:
    """Return why no cluster can be started here, in one line, or None if one can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} missing); Debian: slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "a Slurm of several nodes on one machine has to be started as root"


def wait_until(condition, seconds: float, what: str):
    """Wait until `condition()` is true and return its value. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out after {seconds:g} s: {what}"
        time.sleep(0.1)
    return value


class Cluster:
    """`nodes` nodes called n1, n2, ...; use as a context manager."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            for name in self.names:
                self.power_on(name)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the nodes first, so that none reports a lost controller; use SIGKILL, because the folder is removed."""
        for name in reversed(list(self._processes)):
            self._kill(name)

    # ------------------------------------------------------------------------------------------------ nodes

    def power_on(self, name: str) -> None:
        """Start a node; it takes jobs once it has registered with the controller."""
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        namespaces = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
        self._start(name, *namespaces, "bash", "-c", NODE, "node", name, str(self.folder))

    def power_off(self, name: str) -> None:
        """Kill every process of a node at once, slurmd included."""
        self._kill(name)

    def wait_idle(self, seconds: float = 60.0) -> None:
        """Wait until every node is idle."""

        def states() -> list[str]:
            return self.command("sinfo", "-h", "-N", "-o", "%T", check=False).split()

        wait_until(lambda: states() == ["idle"] * len(self.names), seconds, f"all nodes idle; see {self.folder}/log")

    # ------------------------------------------------------------------------------------------------ commands

    def command(self, *words: str, check: bool = True, cwd: Path | None = None, **environ: str) -> str:
        """Return what one of Slurm's commands prints on both streams."""
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**self.environ, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.returncode}: {done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the controller's record of a job: `JobState`, `Restarts`, `ExitCode` and so on."""
        text = self.command("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    # ------------------------------------------------------------------------------------------------ starting

    def _write_files(self) -> None:
        for name in ("munge", "state", "log", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        addresses = {name: f"127.0.1.{number}" for number, name in enumerate(self.names, 1)}
        hosts = Path("/etc/hosts").read_text() + "".join(f"{where} {name}\n" for name, where in addresses.items())
        (self.folder / "hosts").write_text(hosts)
        control, *ports = free_ports(len(self.names) + 1)
        settings = {
            **SETTINGS,
            "SlurmctldHost": f"{socket.gethostname().split('.')[0]}(127.0.0.1)",
            "SlurmctldPort": control,
            "AuthInfo": f"socket={self.folder}/munge/socket,cred_expire=5",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd.%n.pid",
            "SlurmctldLogFile": self.folder / "log" / "slurmctld.log",
            "SlurmdLogFile": f"{self.folder}/log/slurmd.%n.log",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for (name, where), port in zip(addresses.items(), ports, strict=True):
            lines.append(
                f"NodeName={name} NodeHostname={name} NodeAddr={where} Port={port} CPUs={CPUS} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=16000 State=UNKNOWN"
            )
        lines.append(f"PartitionName=main Nodes={','.join(self.names)} Default=YES MaxTime=INFINITE DefaultTime=30")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start_munge(self) -> None:
        where = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._start("munged", "munged", "--foreground", "--force", *(f"--{o}={where / f}" for o, f in files.items()))
        wait_until(lambda: (where / "socket").exists(), 20, f"munged's socket; see {self.folder}/log/munged.out")

    def _start(self, name: str, *words: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                words,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    """Have the kernel send SIGKILL when the tests' process ends (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)


def free_ports(count: int) -> list[int]:
    """Return TCP ports that no process listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
