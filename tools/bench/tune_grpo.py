"""`megatrain tune method=grpo` against TRL's GRPOTrainer: seconds a step, in turns, and the rewards of both.

    python tools/bench/tune_grpo.py runs/sft prompts.jsonl [--steps 12] [--rounds 3] [--new-tokens 14] [-- word ...]

The same model (exported for TRL), prompts, replies a step, sampling, learning rate and reward on one thread: a reply
counts 1 if it has the record's `answer` in it. Each turn is a process of its own. Its figures are the median wall time
of its steps after the first two, and processor time a step, which other programs on the machine disturb less: TRL's is
the median over steps, megatrain's the difference to a run of `SHORT` steps. The verdict is the median of the rounds'
ratios. What differs: TRL's sampling is transformers' generate; megatrain also has its journal, its checks and a process
for the rewards. Words after `--` are overrides of megatrain's command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LR, GROUP = 2e-4, 8
WARM = 2
"""First steps that do not count."""
SHORT = 3
"""Steps of the run whose processor time stands for a start."""


def main() -> None:
    """Compare, or be TRL's turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replies", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=14)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--trl", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*")
    arguments = parser.parse_args()
    if arguments.trl:
        trl_turn(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="bench-grpo-") as name:
        folder = Path(name)
        run("megatrain", "export", f"path={arguments.run}", f"out={folder / 'hf'}")
        megatrain_run(arguments, folder, "prepares", SHORT)
        ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
        for number in range(arguments.rounds):
            ours, theirs = megatrain_turn(arguments, folder, number), trl_turn_apart(arguments, folder)
            for kind, found in ratios.items():
                found.append(ours[kind] / theirs[kind])
            print(f"round {number + 1}: megatrain {told(ours)}; TRL {told(theirs)}", flush=True)
        for kind, found in ratios.items():
            print(f"megatrain / TRL, {kind}: median of {len(found)} rounds {statistics.median(found):.2f}")


def told(turn: dict[str, Any]) -> str:
    """Return a turn as text."""
    wall, cpu = f"{turn['wall']:.2f} s wall", f"{turn['cpu']:.2f} s cpu"
    return f"{wall} and {cpu} a step, reward {turn['first']:.2f} to {turn['last']:.2f}"


def run(*words: str) -> float:
    """Run a Python module to its end; return its seconds of processor time. What it printed is shown if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", *words] if not words[0].endswith(".py") else [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def summary(steps: list[float], rewards: list[float], cpu: float) -> dict[str, Any]:
    """Return a turn's figures: rewards are means over its first and its last quarter."""
    part = max(1, len(rewards) // 4)
    return {
        "wall": statistics.median(steps[WARM:]),
        "cpu": cpu,
        "first": statistics.mean(rewards[:part]),
        "last": statistics.mean(rewards[-part:]),
    }


def megatrain_turn(arguments: argparse.Namespace, folder: Path, number: int) -> dict[str, Any]:
    """Run megatrain's turn."""
    start = megatrain_run(arguments, folder, f"short{number}", SHORT)
    cpu = (megatrain_run(arguments, folder, f"r{number}", arguments.steps) - start) / (arguments.steps - SHORT)
    lines = (folder / "runs" / f"r{number}" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return summary([record["step_time_s"] for record in records], [record["reward"] for record in records], cpu)


def megatrain_run(arguments: argparse.Namespace, folder: Path, name: str, steps: int) -> float:
    """Run megatrain for some steps; return its seconds of processor time."""
    return run(
        *("megatrain", "tune", str(arguments.run), "method=grpo", f"data.paths=[{arguments.prompts.absolute()}]"),
        *(f"data.dir={folder / 'data'}", f"run.dir={folder / 'runs'}", f"run.name={name}", "engine=native"),
        *("tracking=none", "method.rewards=[contains]", f"train.steps={steps}", f"optim.lr={LR}"),
        *("optim.schedule=constant", "optim.warmup_steps=2", "method.advantages=none", f"method.group_size={GROUP}"),
        *(f"train.global_batch_size={arguments.replies}", f"train.micro_batch_size={arguments.replies}"),
        *(f"method.generate_batch_size={arguments.replies}", f"method.max_new_tokens={arguments.new_tokens}"),
        *(f"train.seq_len={arguments.seq_len}", "launch.device=cpu", *arguments.words),
    )


def trl_turn_apart(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run TRL's turn in a process of its own."""
    sizes = ("--steps", str(arguments.steps), "--replies", str(arguments.replies))
    words = (*sizes, "--new-tokens", str(arguments.new_tokens), "--trl", str(folder / "hf"))
    run(__file__, str(arguments.run), str(arguments.prompts), *words)
    found = json.loads((folder / "hf" / "turn.json").read_text())
    return summary(found["steps"], found["rewards"], statistics.median(found["cpu"][WARM:]))


def trl_turn(arguments: argparse.Namespace) -> None:
    """Train with TRL and write the times and rewards of the steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(arguments.trl)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ended = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    ends = json.loads((arguments.trl / "generation_config.json").read_text())["eos_token_id"]
    end = next(token for token in reversed(ended) if token in ends)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # the end of a reply
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    with arguments.prompts.open() as file:
        records = [json.loads(line) for line in file]
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": str(r["answer"])} for r in records]
    rewards: list[float] = []

    def contains(completions: Any, answer: Any, **_: Any) -> list[float]:
        found = [float(right in said[0]["content"]) for said, right in zip(completions, answer, strict=True)]
        rewards.append(statistics.mean(found))
        return found

    times: list[float] = []
    cpu: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Notes when steps begin and end."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())
            cpu.append(-time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()
            cpu[-1] += time.process_time()

    config = GRPOConfig(
        output_dir=str(arguments.trl / "out"), max_steps=arguments.steps, save_strategy="no", bf16=False, use_cpu=True,
        report_to="none", logging_steps=1, disable_tqdm=True, activation_checkpointing=False, learning_rate=LR,
        dataloader_pin_memory=False, lr_scheduler_type="constant_with_warmup", warmup_steps=2, seed=0,
        per_device_train_batch_size=arguments.replies, num_generations=GROUP, scale_rewards="none",
        max_completion_length=arguments.new_tokens,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.trl), args=config, reward_funcs=contains,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    (arguments.trl / "turn.json").write_text(json.dumps({"steps": times, "cpu": cpu, "rewards": rewards}))


if __name__ == "__main__":
    main()
