"""Run a training job under random faults and compare it with an undisturbed run: python tools/soak.py --minutes 30

Faults begin after a start's first step, at exponentially distributed intervals with a mean of 15 s:

- SIGKILL of a rank, at any moment or during a save;
- SIGSTOP of a rank;
- SIGUSR1 to the agent, after which the command is started again, like a Slurm requeue;
- a disk that is read-only for some seconds (only as root, because it has to be mounted);
- an MLflow server that is gone, hangs or answers 500 for some seconds.

After the given minutes SIGUSR1 ends the job, and an undisturbed run makes the same number of steps. The exit code is
0 if

- metrics and the last checkpoint's files equal those of the undisturbed run bit for bit, and MLflow has every step
  once;
- the goodput ledger adds up to the wall time measured here within 1%, or 2.5 s in a short run, because no ledger sees
  the interpreter's own exit;
- its goodput is within 5 percentage points of the prediction from this program's own timings. With N starts, a mean
  time M from a start's first step to its fault, a mean time R from a fault to the next first step, and S seconds before
  the first and after the last step,

      goodput = N (M - k L - d M / T) / (S + N M + (N - 1) R),    L = T / 2 + w,

  where T is the time between two saves, d the time that a save blocks the loop, w the time that writing one takes in
  the background, and k the share of starts that ended without saving. The mean loss of half an interval is the
  first-order model of Young, "A first order approximation to the optimum checkpoint interval" (1974); see also Daly
  (2006).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.resilience.ledger import FILE, read_ledger, summarise
from megatrain.tracking.events import read_events

EVERY = 20
RANKS = 2
JOB = [
    "train", "model=tiny", "model.num_layers=2", "model.hidden_size=32", "data=files", "data.name=soak",
    "train.seq_len=32", "train.global_batch_size=8", "train.micro_batch_size=2", "train.eval_every=0",
    "train.eval_steps=1", "optim.lr=1e-3", "optim.schedule=constant", "train.steps=10000000", "launch.timeout_s=120",
    f"launch.nproc_per_node={RANKS}", f"checkpoint.every={EVERY}", "checkpoint.retry_wait_s=0.5",
    "checkpoint.retries=10000", "resilience.max_restarts=100000", "resilience.hang_timeout_s=10",
]  # fmt: skip
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "batch_hash", "updated")
LONGEST_S = 400.0
"""The soak fails if a start makes no step within this time."""


class Proxy:
    """A proxy for the MLflow server: forwards, closes connections, accepts them without answering, or answers 500."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.mode = "forward"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._held: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        mode = self.mode
        if mode == "dead":
            connection.close()
        elif mode == "hung":
            self._held.append(connection)
        elif mode == "500":
            with contextlib.suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.close()
        else:
            with contextlib.suppress(OSError):
                onward = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._copy, args=(onward, connection), daemon=True).start()
                self._copy(connection, onward)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        """Copy data until one end closes or the mode changes."""
        with contextlib.suppress(OSError):
            while self.mode == "forward" and (received := source.recv(1 << 16)):
                target.sendall(received)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def recover(self) -> None:
        """Forward again, and close the connections that hang."""
        self.mode = "forward"
        while self._held:
            self._held.pop().close()


class Soak:
    """One run under faults, and this program's own timings of it."""

    def __init__(
        self, folder: Path, words: list[str], proxy: Proxy | None, chance: random.Random, mean_s: float
    ) -> None:
        self.folder, self.words, self.proxy, self.chance, self.mean_s = folder, words, proxy, chance, mean_s
        self.run_dir = folder / "runs" / "soak"
        self.disk = self.run_dir / "checkpoints"
        self.has_disk = os.geteuid() == 0
        self.counts: Counter[str] = Counter()
        self.up: list[float] = []
        self.down: list[float] = []
        self.ends_without_save = 0
        self.wall_s = self.edges_s = 0.0

    def run(self, minutes: float) -> None:
        """Start the job, and again after each requeue, and inject faults. Raises AssertionError if it ends badly."""
        if self.has_disk:
            self.disk.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(self.disk)], check=True)
        began = since = time.monotonic()
        process = self._start()
        try:
            starts = 0
            while self._first_step(process, starts):
                first_step = time.monotonic()
                if starts:
                    self.down.append(first_step - since)
                else:
                    self.edges_s += first_step - since
                starts = self._num_starts()
                process, since = self._disturb(process, began + 60 * minutes)
                self.up.append(since - first_step)
                if process.poll() is not None:
                    break
            code = process.wait(timeout=LONGEST_S)
            assert code == 75, f"the run ended with exit code {code}: {(self.folder / 'soak.log').read_text()[-3000:]}"
            self.wall_s = time.monotonic() - began
            done = read_events(self.run_dir / "events.jsonl")[-1]
            assert done["kind"] == "stop" and done["status"] == "stopped", done
        finally:
            process.kill()
            process.wait()

    def close(self) -> None:
        """Unmount the small disk."""
        if self.has_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)

    def _start(self) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self.proxy is not None:
            environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self.proxy.port}"
        with (self.folder / "soak.log").open("ab") as log:
            command = [sys.executable, "-m", "megatrain", *self.words]
            return subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def _num_starts(self) -> int:
        path = self.run_dir / "events.jsonl"
        return sum(e["kind"] in ("start", "resume") for e in read_events(path)) if path.exists() else 0

    def _last(self, name: str, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the last record of a file of the run, of one of these kinds if any are given."""
        for record in reversed(_records(self.run_dir / name)):
            if not kinds or record["kind"] in kinds:
                return record
        return {}

    def _first_step(self, process: subprocess.Popen[bytes], starts: int) -> bool:
        """Wait for the first step after start number `starts`; return False if the run has ended."""
        deadline = time.monotonic() + LONGEST_S
        while time.monotonic() < deadline:
            if self._num_starts() > starts:
                begun = self._last("events.jsonl", ("start", "resume")).get("time", "")
                if self._last("metrics.jsonl").get("time", "") > begun:
                    return True
            if process.poll() is not None:
                return False
            time.sleep(0.1)
        raise AssertionError(f"no step within {LONGEST_S:g} s after start {starts}")

    def _disturb(self, process: subprocess.Popen[bytes], until: float) -> tuple[subprocess.Popen[bytes], float]:
        """Inject faults until one ends the ranks; return the process that continues, and when that fault happened."""
        faults: list[Callable[[], bool]] = [self._kill, self._kill_in_save, self._stop]
        names = ["SIGKILL", "SIGKILL in a save", "SIGSTOP", "requeue"]
        others: dict[str, Callable[[], None]] = {}
        if self.has_disk:
            others["disk refuses"] = self._refuse
        if self.proxy is not None:
            others |= {f"MLflow {mode}": partial(self._fail_server, mode) for mode in ("dead", "hung", "500")}
        while True:
            due = time.monotonic() + self.chance.expovariate(1 / self.mean_s)
            while time.monotonic() < min(due, until) and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is not None or time.monotonic() >= until:
                process.send_signal(signal.SIGUSR1)
                process.wait(timeout=LONGEST_S)
                return process, self._end_of_steps()
            name = self.chance.choice([*names, *others])
            if name in others:
                self.counts[name] += 1
                others[name]()
            elif name == "requeue":
                struck = time.monotonic()
                process.send_signal(signal.SIGUSR1)
                if process.wait(timeout=LONGEST_S) != 75:
                    return process, struck  # the run failed
                self.counts[name] += 1
                return self._start(), struck
            elif faults[names.index(name)]():
                self.counts[name] += 1
                self.ends_without_save += 1
                return process, time.monotonic()

    def _end_of_steps(self) -> float:
        """Return when the last step was done, on this program's clock."""
        last = time.time() - _seconds(self._last("metrics.jsonl")["time"])
        self.edges_s += last
        return time.monotonic() - last

    def _signal(self, number: int) -> bool:
        """Send a signal to a random rank; return False if no rank is running."""
        pids = rank_pids(self.run_dir)
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(pids), number)
            return True
        return False

    def _kill(self) -> bool:
        return self._signal(signal.SIGKILL)

    def _stop(self) -> bool:
        return self._signal(signal.SIGSTOP)

    def _kill_in_save(self) -> bool:
        """Kill a rank the next time a checkpoint is being written."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if any(self.disk.glob("*.writing")):
                time.sleep(self.chance.uniform(0, 0.05))
                return self._signal(signal.SIGKILL)
            time.sleep(0.001)
        return False

    def _refuse(self) -> None:
        """Make the checkpoints' disk read-only for a while."""
        deadline = time.monotonic() + 10
        remount = ["mount", "-o", "remount,ro", str(self.disk)]
        while subprocess.run(remount, capture_output=True, check=False).returncode and time.monotonic() < deadline:
            time.sleep(0.02)  # busy while a file is open for writing
        time.sleep(self.chance.uniform(1, 4))
        subprocess.run(["mount", "-o", "remount,rw", str(self.disk)], capture_output=True, check=True)

    def _fail_server(self, mode: str) -> None:
        assert self.proxy is not None
        self.proxy.mode = mode
        time.sleep(self.chance.uniform(2, 8))
        self.proxy.recover()


def rank_pids(run_dir: Path) -> list[int]:
    """Return the ranks' processes: session leaders that have a rank's log open."""
    logs = {str((run_dir / "logs" / f"rank_{rank:05d}.log").resolve()) for rank in range(RANKS)}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                if os.getsid(pid) == pid and any(os.readlink(fd) in logs for fd in (entry / "fd").iterdir()):
                    found.append(pid)
    return sorted(found)


def _records(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file that may be growing; only the last 64 KiB of a long one."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536))
        lines = file.read().splitlines(keepends=True)[int(size > 65536) :]
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _seconds(moment: str) -> float:
    from megatrain.report.run_page import seconds

    return seconds(moment)


def run(folder: Path, *words: str) -> None:
    """Run the command to its end. Raises AssertionError if it fails."""
    command = [sys.executable, "-m", "megatrain", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return a run's metrics records."""
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def last_files(folder: Path, name: str) -> tuple[int, dict[str, str]]:
    """Return the last checkpoint's step and its files' checksums."""
    last = max((folder / "runs" / name / "checkpoints").glob("step_*"))
    manifest = json.loads((last / "manifest.json").read_text())
    return manifest["step"], {file: recorded["xxh3"] for file, recorded in manifest["files"].items()}


def start_mlflow(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a real MLflow server with its own store; return the process and its port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return process, port
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError((folder / "server.log").read_text()[-3000:])


def steps_at(port: int) -> list[int]:
    """Return the steps whose loss an MLflow server has, over all its runs."""
    from mlflow import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{port}")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return sorted(point.step for one in runs for point in client.get_metric_history(one.info.run_id, "loss"))


def predicted_goodput(soak: Soak, step_s: float, stall_s: float, save_s: float) -> float:
    """Return the goodput that the module's docstring predicts."""
    starts, between = len(soak.up), EVERY * step_s
    mean_up = statistics.mean(soak.up)
    mean_down = statistics.mean(soak.down) if soak.down else 0.0
    lost = soak.ends_without_save / starts * (between / 2 + save_s)
    effective = mean_up - lost - stall_s * mean_up / between
    return starts * effective / (soak.edges_s + starts * mean_up + (starts - 1) * mean_down)


def judge(soak: Soak, folder: Path, port: int | None) -> list[tuple[str, str, bool]]:
    """Compare the runs: what was checked, what was found, and whether it passes."""
    records, true = (metrics(folder, name) for name in ("soak", "undisturbed"))
    equal = [[record[key] for key in SAME] for record in records] == [[record[key] for key in SAME] for record in true]
    files = last_files(folder, "soak") == last_files(folder, "undisturbed")
    rows = [("metrics equal the undisturbed run's", f"{len(records)} steps", equal)]
    rows.append(("last checkpoint's files equal, bit for bit", f"step {last_files(folder, 'soak')[0]}", files))
    if port is not None:
        steps = steps_at(port)
        # MLflow may have steps from before the last fault that were not repeated before the end
        once = steps == list(range(1, len(steps) + 1)) and len(steps) >= len(true)
        rows.append(("every step once in MLflow", f"{len(steps)} steps", once))
    life = summarise(read_ledger(soak.run_dir / FILE))
    booked = sum(life.seconds.values())
    close = abs(booked - soak.wall_s) <= max(0.01 * soak.wall_s, 2.5)
    rows.append(("ledger adds up to wall time within 1%", f"{booked:.1f} of {soak.wall_s:.1f} s", close))
    saves = [event for event in read_events(soak.run_dir / "events.jsonl") if event["kind"] == "save"]
    stall_s = statistics.mean(save["stall_s"] for save in saves)
    save_s = statistics.median(save["seconds"] for save in saves)
    step_s = statistics.mean(record["step_time_s"] for record in records)
    expected = predicted_goodput(soak, step_s, stall_s, save_s)
    goodput = f"{life.goodput:.1%}, predicted {expected:.1%}"
    rows.append(("goodput within 5 points of the prediction", goodput, abs(life.goodput - expected) <= 0.05))
    rows.append(
        ("there were faults", ", ".join(f"{n} {name}" for name, n in sorted(soak.counts.items())), bool(soak.down))
    )
    print(f"{len(soak.up)} starts; mean time to a fault {statistics.mean(soak.up):.1f} s; ", end="")
    print(f"from a fault to the next step {statistics.mean(soak.down) if soak.down else 0:.1f} s; step {step_s:.3f} s")
    print("  ".join(f"{name} {spent:.1f} s" for name, spent in life.seconds.items() if spent))
    return rows


def main() -> int:
    """Run the soak, print what was found, and return 0 if everything passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long faults are injected")
    parser.add_argument("--mean", type=float, default=15, help="mean seconds to a fault")
    parser.add_argument(
        "--seed", type=int, default=None, help="seed of the faults and their times; random unless given"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to work; a temporary folder, removed at the end, unless given"
    )
    parser.add_argument("--without-mlflow", action="store_true", help="leave the tracking server out")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    server = soak = None
    try:
        (folder / "text").mkdir()
        for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
            (folder / "text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
        run(folder, "prepare", "data=files", "data.name=soak", "data.paths=[text/*.txt]", "tokenizer.vocab_size=400")
        print(f"seed {seed}", flush=True)
        words = list(JOB)
        proxy = port = None
        if not arguments.without_mlflow:
            server, port = start_mlflow(folder)
            proxy = Proxy(port)
        else:
            words.append("tracking=none")
        soak = Soak(folder, [*words, "run.name=soak"], proxy, random.Random(seed), arguments.mean)
        if not soak.has_disk:
            print("not root: the read-only disk is left out")
        soak.run(arguments.minutes)
        steps = len(metrics(folder, "soak"))
        print(f"{steps} steps in {soak.wall_s:.0f} s; now the same undisturbed", flush=True)
        run(folder, *JOB, "tracking=none", "run.name=undisturbed", f"train.steps={steps}")
        rows = judge(soak, folder, port)
        for what, found, good in rows:
            print(f"{'ok  ' if good else 'FAIL'}  {what:<44} {found}")
        return 0 if all(good for *_, good in rows) else 1
    except AssertionError as failure:
        print(f"FAIL  {failure}")
        return 1
    finally:
        if soak is not None:
            soak.close()
        if server is not None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
