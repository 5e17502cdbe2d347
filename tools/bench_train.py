"""Tokens per second of `megatrain train` against a bare PyTorch loop over the same model, in turns (A B A B …).

Each turn is a process of its own; its figure is the median step time without the first steps. The verdict is the median of
the ratios of neighbouring turns. Usage: python tools/bench_train.py --pairs 5 --steps 40 [overrides of the train command]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 5


def main() -> None:
    """Run the turns and print one line each, then the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(bare_loop(arguments.overrides)))
        return
    ratios = []
    for pair in range(arguments.pairs):
        ours = megatrain_turn(arguments.steps, arguments.overrides)
        theirs = bare_turn(arguments.steps, arguments.overrides)
        ratios.append(theirs / ours)
        print(f"pair {pair + 1}: megatrain {ours * 1e3:.1f} ms a step, bare loop {theirs * 1e3:.1f} ms", flush=True)
    print(
        f"megatrain's tokens/s over the bare loop's: median {statistics.median(ratios):.3f}, all {[f'{r:.3f}' for r in ratios]}"
    )


def words(steps: int, overrides: list[str]) -> list[str]:
    """The train command's overrides: native engine on one process, nothing saved or evaluated inside the timed steps."""
    return [
        "engine=native", f"train.steps={steps}", "checkpoint.every=0", "checkpoint.keep=1", "train.eval_steps=1",
        "run.name=bench", *overrides,
    ]  # fmt: skip


def megatrain_turn(steps: int, overrides: list[str]) -> float:
    """Median seconds a step of `megatrain train`, everything switched on that a user has on."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "megatrain", "train", *words(steps, overrides), f"run.dir={folder}"]
        subprocess.run(command, check=True, capture_output=True)
        lines = (Path(folder) / "bench" / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["step_time_s"] for line in lines[WARM_UP:-1])


def bare_turn(steps: int, overrides: list[str]) -> float:
    """Median seconds a step of the bare loop."""
    command = [sys.executable, __file__, "--bare", *words(steps, overrides)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def bare_loop(overrides: list[str]) -> float:
    """The least that trains: batches in memory, forward, backward, clip, fused AdamW, the loss read each step."""
    import torch

    from megatrain.compose import compose
    from megatrain.launch.environment import usable_cores
    from megatrain.launch.worker import open_data
    from megatrain.model.init import build_model
    from megatrain.optim.adamw import adamw, parameter_groups

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", usable_cores())))
    config = open_data(compose("train", overrides)).config
    loop = config.train
    model = build_model(config.model, seed=1)
    model.train()
    groups = parameter_groups(((n, p, p.dim()) for n, p in model.named_parameters()), config.optim)
    optimizer = adamw(groups, config.optim)
    if config.compile:
        for block in model.blocks:
            block.compile()
    ids = torch.randint(0, config.model.vocab, (loop.steps, loop.global_batch_size, loop.seq_len + 1))
    tokens = loop.global_batch_size * loop.seq_len
    times = []
    for step in range(loop.steps):
        started = time.perf_counter()
        total = 0.0
        for part in ids[step].split(loop.micro_batch_size):
            loss = model(part[:, :-1], part[:, 1:]) / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
