"""The contenders of a comparison: start each turn as a separate process, and collect its figures.

Imports no torch, so the parent process stays small; its size would show in the children's peak memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".venv-bench"
"""Environments of the peers that cannot share megatrain's, one each: they need different versions of the same
packages."""

BARE = ("bare-eager", "bare-compiled")
FOREIGN = {"huggingface": ("transformers", "accelerate"), "litgpt": ("litgpt", "lightning", "torchmetrics")}
"""Peers with their own environment, and the packages that they need besides torch."""

PEERS = (*BARE, *FOREIGN)
"""The peers that megatrain is compared with."""

PROBE = """
import importlib.metadata as metadata, json, sys, torch
missing = []
versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
for name in sys.argv[1:]:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"versions": versions, "missing": missing, "gpu": gpu, "cuda": torch.version.cuda}))
"""


class TurnFailed(Exception):
    """Raised when a turn gave no figures; the message says why."""


@dataclass
class Turn:
    """One process's figures. Times in seconds, memory in bytes.

    `step_s` is the median over the timed steps; `whole_step_s` is their mean with everything between them (metrics
    written, copies, saves). `first_step_s` is from the start of the process to the end of the first step.
    `peak_rss_bytes` is that of its largest process, until it was stopped; None if unknown. `step_times` has every step.
    """

    contender: str
    round: int
    step_s: float
    whole_step_s: float
    tokens_per_s: float
    first_step_s: float
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    step_times: list[float] = field(repr=False)
    losses: list[float] = field(default_factory=list, repr=False)


# ------------------------------------------------------------------------------------------- environments


def python_of(peer: str) -> Path:
    """Return the interpreter that runs a contender."""
    if peer not in FOREIGN:
        return Path(sys.executable)
    return ENVIRONMENTS / peer / ("Scripts" if os.name == "nt" else "bin") / "python"


def probe(peer: str) -> dict[str, Any]:
    """Return what a contender's environment has: `versions`, `gpu` (its name, or None) and `cuda`.

    Raises:
        TurnFailed: the environment or one of its packages is missing; the message says how to make it.
    """
    python = python_of(peer)
    how = f"make its environment with: python {(HERE / 'compare.py').relative_to(ROOT)} --setup --peers {peer}"
    if not python.exists():
        raise TurnFailed(f"{ENVIRONMENTS.relative_to(ROOT) / peer} does not exist; {how}")
    done = subprocess.run([python, "-c", PROBE, *FOREIGN.get(peer, ())], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TurnFailed(f"{python} cannot import torch ({last_line(done.stderr)}); {how}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if found["missing"]:
        raise TurnFailed(f"{', '.join(found['missing'])} is not installed in {python.parents[1]}; {how}")
    return found


def make_environment(peer: str) -> None:
    """Make a foreign peer's environment from its requirements, with the build of torch that megatrain runs on.

    Raises:
        TurnFailed: pip failed; the message is the end of its output.
    """
    folder, torch = ENVIRONMENTS / peer, metadata.version("torch")
    print(f"making {folder.relative_to(ROOT)} with torch {torch} and {HERE.name}/peers_{peer}.txt", flush=True)
    if not python_of(peer).exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(python_of(peer)), "-m", "pip", "install", "--quiet", "--progress-bar", "off", f"torch=={torch}"]
    done = subprocess.run([*pip, "-r", str(HERE / f"peers_{peer}.txt")], capture_output=True, text=True, check=False)
    if done.returncode:
        hint = ""
        if "+" in torch:
            build = torch.split("+")[1]
            hint = f"\nset PIP_EXTRA_INDEX_URL to the index that has torch's {build} builds"
        raise TurnFailed("pip failed:\n" + "\n".join(done.stderr.strip().splitlines()[-12:]) + hint)


# ------------------------------------------------------------------------------------------- the job


def prepare(
    folder: Path, words: list[str], device: str, chain: bool = False, document: int | None = None
) -> dict[str, Any]:
    """Write the tokens and the job to a folder; `words` are overrides of the train command.

    `chain` and `document` are as in prepare_job.py.

    Raises:
        TurnFailed: the train command would refuse the words.
    """
    options = [*(["--chain"] if chain else []), *([f"--documents={document}"] if document else [])]
    command = [sys.executable, str(HERE / "prepare_job.py"), *options, str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environ(1, device))
    if done.returncode:
        raise TurnFailed(last_line(done.stderr).removeprefix("megatrain.errors.ConfigError: "))
    return {**json.loads(done.stdout.splitlines()[-1]), "device": device}


def environ(threads: int, device: str, **more: str) -> dict[str, str]:
    """Return the environment variables of a turn: its threads, and no GPU if the CPU is measured."""
    number = str(threads)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join(part for part in (str(ROOT), kept.get("PYTHONPATH")) if part)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    fixed = {
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "PYTHONPATH": path,
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**kept, **fixed, **hidden, **more}


# ------------------------------------------------------------------------------------------- turns


def take_turn(contender: str, number: int, job: dict[str, Any], folder: Path, threads: int, warmup: int) -> Turn:
    """Run one contender once. With `cut` in the job, megatrain is killed after the last step, before it saves.

    Raises:
        TurnFailed: its process failed, or reported too few steps.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f"{contender}-", dir=folder))
    try:
        if contender == "megatrain":
            return megatrain_turn(number, job, scratch, threads, warmup)
        return peer_turn(contender, number, job, scratch, threads, warmup)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass
class MegatrainProcess:
    """A running `megatrain train` of a job; `turn` waits for it."""

    job: dict[str, Any]
    scratch: Path
    threads: int
    extra: list[str] = field(default_factory=list)
    device_bytes: int | None = None
    resident_bytes: int | None = None

    def __post_init__(self) -> None:
        longer = [f"train.steps={100 * self.job['steps']}"] if self.job.get("cut") else []
        words = [*self.job["words"], f"run.dir={self.scratch}", "run.name=run", *self.extra, *longer]
        command = [sys.executable, "-m", "megatrain", "train", *words]
        self.began = time.time()
        self.process = Started(command, self.scratch, environ(self.threads, self.job["device"]))

    def turn(self, number: int, warmup: int) -> Turn:
        """Return its figures, from metrics.jsonl. `tokens_per_s` is that of this process's job only."""
        run = self.scratch / "run"
        cut = self.job.get("cut") and self._cut(run / "metrics.jsonl")
        peak = self.process.wait("megatrain", killed=bool(cut))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][: self.job["steps"]]
        times = [record["step_time_s"] for record in records]
        wall = [datetime.fromisoformat(record["time"].replace("Z", "+00:00")).timestamp() for record in records]
        last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
        return figures(
            "megatrain", number, self.job, warmup, times, wall, self.began, self.resident_bytes if cut else peak,
            self.device_bytes if cut else last.get("peak_device_bytes"), [record["loss"] for record in records],
        )  # fmt: skip

    def _cut(self, metrics: Path) -> bool:
        """Kill the run, and with it its ranks, once its steps are written; return whether that was necessary."""
        try:
            while self.process.is_running():
                if metrics.exists() and len(metrics.read_bytes().splitlines()) > self.job["steps"]:
                    self.device_bytes = used_device_bytes() if self.job["device"] == "cuda" else None
                    self.resident_bytes = peak_resident_bytes(self.process.process.pid)
                    self.process.process.kill()
                    return True
                time.sleep(0.2)
        except BaseException:
            self.process.process.kill()
            raise
        return False


def megatrain_turn(number: int, job: dict[str, Any], scratch: Path, threads: int, warmup: int) -> Turn:
    """Run `megatrain train` with everything on that a user has on."""
    return MegatrainProcess(job, scratch, threads).turn(number, warmup)


def peer_turn(contender: str, number: int, job: dict[str, Any], scratch: Path, threads: int, warmup: int) -> Turn:
    """Run a peer's loop in its own environment."""
    kind, _, form = contender.partition("-")
    file = scratch / "job.json"
    file.write_text(json.dumps({**job, "form": form, "scratch": str(scratch)}))
    off = {"TORCHDYNAMO_DISABLE": "1"} if kind == "litgpt" and not job["compile"] else {}
    command = [str(python_of(contender)), str(HERE / f"peer_{kind}.py"), str(file)]
    began = time.monotonic()
    process = Started(command, scratch, environ(threads, job["device"], **off))
    peak = process.wait(contender)
    report = json.loads((scratch / "stdout").read_text().splitlines()[-1])
    ends = report["ends"]
    times = [after - before for before, after in zip([began, *ends], ends, strict=False)]
    return figures(
        contender, number, job, warmup, times, ends, began, peak,
        report.get("peak_device_bytes"), report.get("losses", []),
    )  # fmt: skip


def figures(
    contender: str, number: int, job: dict[str, Any], warmup: int, times: list[float], ends: list[float], began: float,
    peak_rss: int | None, peak_device: int | None, losses: list[float],
) -> Turn:  # fmt: skip
    """Return a turn from its steps' durations and end times (on the same clock as `began`)."""
    if len(times) != job["steps"] or len(ends) != job["steps"]:
        raise TurnFailed(f"{contender} reported {len(times)} of {job['steps']} steps")
    step = statistics.median(times[warmup:])
    whole = (ends[-1] - ends[warmup - 1]) / (len(ends) - warmup)
    rate = job["global_batch"] * job["seq_len"] / step
    return Turn(contender, number, step, whole, rate, ends[0] - began, peak_rss, peak_device, times, losses)


class Started:
    """A process whose output goes to its folder, and whose peak memory is read when it has ended."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)

    def is_running(self) -> bool:
        """Return whether it is still running, without reaping it."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, name: str, killed: bool = False) -> int:
        """Wait for the end; return the peak resident memory in bytes of the largest process, children included.

        Raises:
            TurnFailed: it failed, unless `killed` by us.
        """
        try:
            _, status, usage = os.wait4(self.process.pid, 0)
        except BaseException:  # Ctrl-C: leave nothing running
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            raise
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        if code and not killed:
            raise TurnFailed(
                f"{name} ended with {code}: {last_line((self.folder / 'stderr').read_text(errors='replace'))}"
            )
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_line(text: str) -> str:
    """Return the last line of a process's output, or a note that there was none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


# ------------------------------------------------------------------------------------------- the machine


def machine(found: dict[str, Any]) -> dict[str, Any]:
    """Return where the figures come from; `found` is the result of `probe` for megatrain's environment."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": found["gpu"],
        "cuda": found["cuda"],
        "system": f"{platform.system()} {platform.release()}",
        "load_1min": os.getloadavg()[0],
    }


def used_device_bytes() -> int | None:
    """Return the memory in use on the first GPU, from the driver. Torch frees none: for one process it is the peak."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={first}"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        return int(done.stdout) * 2**20
    return None


def peak_resident_bytes(pid: int) -> int | None:
    """Return the peak memory of the largest of a running process and its children (Linux; None elsewhere)."""
    peaks = []
    with contextlib.suppress(OSError, psutil.Error):
        for process in (started := psutil.Process(pid), *started.children(recursive=True)):
            found = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            peaks.append(int(found[1]) * 1024 if found else 0)
    return max(peaks, default=0) or None


def cpu_name() -> str:
    """Return the processor's name from /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Return the commit that is checked out, with `+` if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True).stdout
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "megatrain", "kernels"], check=False).returncode
        return head.strip() + ("+" if dirty else "")
    return None
