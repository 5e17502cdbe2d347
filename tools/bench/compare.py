"""megatrain against its peers on one device, in turns (A B C A B C …): same model, tokens, batch, precision, threads.

    python tools/bench/compare.py --setup                                  # once: the peers' environments
    python tools/bench/compare.py --model small --seq-len 256 --batch 16 --micro-batch 8
    python tools/bench/compare.py --model gpt2_124m --precision bf16 --compile --device cuda --json out.json

Peers: `bare-eager` and `bare-compiled`, the least PyTorch that trains megatrain's own model class; `huggingface`, the
Trainer of transformers over its model of the same shape; `litgpt`, its own pretraining loop over its model of the same
shape. Each turn is a separate process, on random tokens in a temporary folder. A turn's figure is the median time of
its steps without the warm-up; the verdict is the median, over the rounds, of the ratios of megatrain's turn to the
peer's in the same round, with an interval that holds the true median with 95% probability.

What is equal: shape, batch, micro-batches, tokens, AdamW's settings, clipping, the loss read each step, threads,
precision (fp32; bf16 on fp32 parameters: autocast for the peers). What is not: `megatrain train` also has its journal,
tracking and checks on; where `--compile` is given, megatrain compiles block by block, the others as a whole; and its
launcher has glibc keep freed memory, which a plain `python train.py` has not. A word at the end is an override of the
train command (`train.recompute=full`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from intervals import Median, median_interval
from turns import (
    FOREIGN,
    PEERS,
    Turn,
    TurnFailed,
    commit,
    machine,
    make_environment,
    prepare,
    probe,
    take_turn,
    usable_cores,
)


def main() -> int:
    """Compare. Return 1 if a turn failed or there was no peer to compare with, 2 if the job is refused."""
    arguments = parse()
    if arguments.setup:
        return setup(arguments.peers)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            result = compare(arguments, Path(folder), lambda text: print(text, flush=True))
        except TurnFailed as error:
            print(f"compare: error: {error}", file=sys.stderr)
            return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + table(result))
    for peer, reason in result["not_measured"].items():
        print(f"not measured: {peer}: {reason}")
    if arguments.markdown:
        text = caption(result) + "\n\n" + table(result) + "\n"
        sys.stdout.write("\n" + text) if arguments.markdown == "-" else Path(arguments.markdown).write_text(text)
    return int(bool(result["failed"]) or not result["ratios"])


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="preset of conf/model (default tiny)")
    parser.add_argument(
        "--pairs", type=int, default=10, help="rounds, each with a turn of every contender (default 10)"
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps a turn (default 40)")
    parser.add_argument("--warmup", type=int, default=5, help="first steps that are not timed (default 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads a process (default: usable cores)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="sequences an optimizer step (default 8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences at once (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a sequence (default 256)")
    parser.add_argument(
        "--peers", type=words, default=list(PEERS), help=f"comma-separated, of {','.join(PEERS)} (default all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--compile", action="store_true", help="torch.compile for megatrain, huggingface and litgpt")
    parser.add_argument(
        "--no-save", action="store_true", help="kill megatrain after its steps: no last save (large models)"
    )
    parser.add_argument("--setup", action="store_true", help="make the peers' environments under .venv-bench, and end")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--markdown", metavar="FILE|-", help="write the table as for the docs")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of the train command")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.peers) - set(PEERS)):
        parser.error(f"--peers {', '.join(unknown)}: there are {', '.join(PEERS)}")
    if arguments.warmup < 1 or arguments.steps <= arguments.warmup:
        parser.error("--steps must be more than --warmup, and --warmup at least 1")
    if arguments.pairs < 1 or arguments.batch % arguments.micro_batch:
        parser.error(
            f"--pairs {arguments.pairs} --batch {arguments.batch} --micro-batch {arguments.micro_batch}: "
            f"pairs must be at least 1, and the batch a multiple of the micro-batch"
        )
    return arguments


def words(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [word for word in text.split(",") if word]


def setup(peers: list[str]) -> int:
    """Make the environments of those peers that need their own."""
    failed = 0
    for peer in (peer for peer in peers if peer in FOREIGN):
        try:
            make_environment(peer)
            print(f"{peer}: {probe(peer)['versions']}")
        except TurnFailed as error:
            print(f"{peer}: error: {error}", file=sys.stderr)
            failed = 1
    return failed


def train_words(arguments: argparse.Namespace, device: str) -> list[str]:
    """Return overrides of the train command: native engine, one process, no save or evaluation in the timed steps."""
    return [
        f"model={arguments.model}", "engine=native", f"precision={arguments.precision}", f"launch.device={device}",
        f"compile={str(arguments.compile).lower()}", f"train.steps={arguments.steps}",
        f"train.global_batch_size={arguments.batch}", f"train.micro_batch_size={arguments.micro_batch}",
        f"train.seq_len={arguments.seq_len}", "optim.schedule=constant", "checkpoint.every=0", *arguments.overrides,
    ]  # fmt: skip


def compare(arguments: argparse.Namespace, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Take all turns and return the whole result.

    Raises:
        TurnFailed: the job is refused, or megatrain itself fails.
    """
    own = probe("megatrain")
    device = arguments.device or ("cuda" if own["gpu"] else "cpu")
    if device == "cuda" and not own["gpu"]:
        raise TurnFailed("--device cuda: torch finds no GPU here")
    job = {**prepare(folder, train_words(arguments, device), device), "cut": arguments.no_save}
    versions, not_measured = {"megatrain": own["versions"]}, {}
    for peer in arguments.peers:
        try:
            versions[peer] = same_build(peer, own)
        except TurnFailed as error:
            not_measured[peer] = str(error)
            say(f"not measured: {peer}: {error}")
    contenders = ["megatrain", *(peer for peer in arguments.peers if peer in versions)]
    turns: list[Turn] = []
    failed: dict[str, str] = {}
    for number in range(1, arguments.pairs + 1):
        for contender in [name for name in contenders if name not in failed]:
            try:
                turn = take_turn(contender, number, job, folder, arguments.threads, arguments.warmup)
            except TurnFailed as error:
                if contender == "megatrain":
                    raise
                failed[contender] = str(error)
                say(f"round {number}: {contender} failed and takes no further turn: {error}")
                continue
            turns.append(turn)
            memory = turn.peak_device_bytes or turn.peak_rss_bytes or 0
            say(
                f"round {number}/{arguments.pairs}: {contender:<14} {turn.step_s * 1e3:9.1f} ms a step "
                f"{turn.tokens_per_s:12,.0f} tokens/s {turn.first_step_s:7.1f} s to the first step "
                f"{memory / 2**20:8,.0f} MiB"
            )
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "tools/bench/compare.py", *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(own),
        "versions": versions,
        "device": device,
        "threads": arguments.threads,
        "warmup": arguments.warmup,
        "job": job,
        "turns": [asdict(turn) for turn in turns],
        "ratios": {peer: ratios(turns, peer) for peer in contenders[1:] if any(t.contender == peer for t in turns)},
        "failed": failed,
        "not_measured": not_measured | failed,
    }


def same_build(peer: str, own: dict[str, Any]) -> dict[str, str]:
    """Return a peer's versions. Raise `TurnFailed` if it is missing or has another build of torch."""
    versions: dict[str, str] = probe(peer)["versions"]
    if versions["torch"] != own["versions"]["torch"]:
        raise TurnFailed(
            f"its environment has torch {versions['torch']}, megatrain's {own['versions']['torch']}; "
            f"python tools/bench/compare.py --setup --peers {peer} makes them equal"
        )
    return versions


def ratios(turns: list[Turn], peer: str) -> dict[str, Any]:
    """Return the ratios of megatrain's tokens/s to a peer's, for the median step and for the whole time between steps.

    Each is given as every round's ratio, and the median of these with its interval.
    """
    ours = {turn.round: turn for turn in turns if turn.contender == "megatrain"}
    theirs = [turn for turn in turns if turn.contender == peer]
    found = {}
    for name in ("step_s", "whole_step_s"):
        each = [getattr(turn, name) / getattr(ours[turn.round], name) for turn in theirs]
        found[name] = {"each": each, **asdict(median_interval(each))}
    return found


# ------------------------------------------------------------------------------------------- output


def table(result: dict[str, Any]) -> str:
    """Return one line per contender: medians over its turns, and the ratio of megatrain's tokens/s to its own."""
    on_gpu = result["device"] == "cuda"
    lines = [
        f"| | ms a step | tokens/s | s to the end of the first step | peak {'GPU memory' if on_gpu else 'RSS'}, MiB "
        f"| megatrain's tokens/s over it | the same, all time between steps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for contender in dict.fromkeys(turn["contender"] for turn in result["turns"]):
        own = [turn for turn in result["turns"] if turn["contender"] == contender]
        step, rate, first = (statistics.median(t[k] for t in own) for k in ("step_s", "tokens_per_s", "first_step_s"))
        peaks = [turn["peak_device_bytes" if on_gpu else "peak_rss_bytes"] for turn in own]
        peak = f"{max(peaks) / 2**20:,.0f}" if all(peaks) else "?"
        found = result["ratios"].get(contender)
        shown = [interval(found[name]) if found else "" for name in ("step_s", "whole_step_s")]
        lines.append(
            f"| {contender} | {step * 1e3:,.1f} | {rate:,.0f} | {first:.1f} | {peak} | {shown[0]} | {shown[1]} |"
        )
    return "\n".join(lines)


def interval(found: dict[str, Any]) -> str:
    """Format a ratio with its interval, and the interval's coverage if it is below 95%."""
    median = Median(**{name: value for name, value in found.items() if name != "each"})
    return str(median) + (f" ({median.coverage:.0%})" if median.coverage < 0.95 else "")


def caption(result: dict[str, Any]) -> str:
    """Describe what was measured, where and when."""
    job, where = result["job"], result["machine"]
    rounds = max(turn["round"] for turn in result["turns"])
    versions = {name: value for found in result["versions"].values() for name, value in found.items()}
    told = ", ".join(f"{name} {value}" for name, value in versions.items())
    return (
        f"`{result['command']}`, {result['date'][:10]}, commit {result['commit']}: {job['model']['name']} "
        f"({job['num_parameters']:,} parameters), {job['global_batch']} x {job['seq_len']} tokens a step, "
        f"micro-batches of {job['micro_batch']}, {job['precision']}, {rounds} rounds of {job['steps']} steps, "
        f"the first {result['warmup']} left out. {where['gpu'] or where['cpu']}, {where['cores']} cores, "
        f"{result['threads']} threads a process; {told}. "
        f"Ratios: median [95% interval]."
    )


if __name__ == "__main__":
    sys.exit(main())
