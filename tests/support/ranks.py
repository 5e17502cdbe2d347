"""Run a function on several gloo ranks, forked from a parent that has already imported torch and DeepSpeed.

A fork costs 0.2 to 0.5 s where a fresh interpreter costs tens; each test case still gets clean processes. The parent
must not hold a process group or start threads in torch.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatrain.distributed.world import World

PRELOADED = (
    "deepspeed",
    "megatrain.training.rank",
    "megatrain.engine.deepspeed",
    "megatrain.engine.native",
    "deepspeed.ops.adam",
    "deepspeed.ops.lion",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)

LINES = 60
"""Lines of a failed rank's trace that a message holds."""

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def preload() -> None:
    """Import both engines once, and what DeepSpeed and torch import only on first use."""
    for module in PRELOADED:
        importlib.import_module(module)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    gc.freeze()  # otherwise every rank's first collection walks the parent's heap


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Run `function(world, *args)` on `size` ranks and return their results in rank order.

    Raises:
        AssertionError: a rank failed; its stack trace is in the message.
        TimeoutError: the time is up; the message names the ranks that are still running.
    """
    preload()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = {_fork(function, rank, size, folder, args): rank for rank in range(size)}
        deadline = time.monotonic() + timeout_s
        failed, causes = [], []
        while children and time.monotonic() < deadline and not failed:
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    rank = children.pop(pid)
                    if status:
                        failed.append(rank)
                        if os.WIFSIGNALED(status):
                            said = (folder / f"stderr{rank}").read_text(errors="replace").strip().splitlines()[-20:]
                            name = signal.Signals(os.WTERMSIG(status)).name
                            causes.append(" / ".join([f"rank {rank} was killed by {name}", *said]))
            time.sleep(0.002)
        if failed:
            time.sleep(0.5)  # let the others fail too and report why
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        errors = ["\n".join(path.read_text().splitlines()[:LINES]) for path in sorted(folder.glob("error*"))]
        assert not failed, "\n".join([f"ranks {failed} did not end well: {'; '.join(causes)}", *errors])
        if children:
            raise TimeoutError(f"ranks {sorted(children.values())} still ran after {timeout_s:g} s")
        return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(size)]


def _fork(function: Callable[..., Any], rank: int, size: int, folder: Path, args: tuple[Any, ...]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    os.environ["LOCAL_RANK"] = str(rank)
    if compiler := sys.modules.get("torch._inductor.async_compile"):
        compiler.AsyncCompile.pool.cache_clear()  # if a test has compiled something, its threads are the parent's
    faulthandler.enable(open(folder / f"error{rank}.fault", "w"))  # noqa: SIM115 - open as long as the rank lives
    os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)  # what C++ says before it aborts
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), size),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )
        control = dist.new_group(backend="gloo") if size > 1 else None
        result = function(World(rank, size, rank, torch.device("cpu"), control), *args)
        (folder / f"result{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"error{rank}").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
