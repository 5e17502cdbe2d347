#!/usr/bin/env python3
"""A step of direct preference optimisation: ours against TRL's DPOTrainer, on the same model and pairs, in turns.

    python tools/bench/tune_dpo.py [--rounds 12] [--threads 2]

Both run in this process, a step each in turn, so drift of the machine hits both. A step is forward, backward, clipping
and AdamW on the same pairs. TRL's step is its compute_loss between torch's own operations, without the overhead of its
loop; `trl` computes the reference in each step (its default), `trl_precomputed` has it beforehand, as ours has it. Ours
packs the pairs into rows; TRL pads each side to the longest. CPU seconds of the process are printed too: they repeat on
a busy machine, where wall time does not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl_pairs import TRL_OPTIONS, Pair, make_dataset, make_tokenizer, pair, read_batches

from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.distributed.world import World
from megatrain.engine.build import build_engine
from megatrain.interop.load_model import load
from megatrain.optim.preferences import DirectPreference, ReferenceTable

SEQ_LEN, ROWS, VOCAB = 512, 4, 1000


def records(count: int) -> list[Pair]:
    """Return pairs whose replies have 10 to 120 words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=5)) for _ in range(1500)]

    def said(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randrange(least, most)))

    return [pair(f"{number} {said(5, 40)}", said(5, 60), said(5, 60)) for number in range(count)]


def make(place: Path, rows: list[Pair]) -> None:
    """Write a tokenizer, a model of transformers, and the dataset of the pairs."""
    tokenizer = make_tokenizer(place, rows, VOCAB)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    make_dataset(place, "pairs", rows)


def our_step(place: Path, num_pairs: int) -> Callable[[MicroBatch], float]:
    """Return a function that trains on a micro-batch with the native engine and returns the loss."""
    loaded, config = load(place / "model"), TrainConfig()
    config.model, config.engine.name, config.launch.device = loaded.config, "native", "cpu"
    config.train.seq_len, config.train.micro_batch_size, config.train.global_batch_size = SEQ_LEN, ROWS, ROWS
    config.parallel.zero, config.optim.weight_decay = 0, 0.0
    objective = DirectPreference(0.1, 0.0, 1.0, ReferenceTable(torch.full((num_pairs, 2), -100.0)))
    engine = build_engine(config, World(0, 1, 0, torch.device("cpu"), None), objective)

    def step(batch: MicroBatch) -> float:
        result = engine.train_step([batch], 1e-6, 1)
        return float(result.loss_sum / result.tokens)

    return step


def their_step(place: Path, rows: list[Pair], precomputed: bool) -> Callable[[MicroBatch], float]:
    """Return a function that trains TRL's model on the pairs of a micro-batch and returns the loss."""
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    args = DPOConfig(output_dir=str(place / "trl"), loss_type=["sigmoid", "sft"], **TRL_OPTIONS)
    trainer = DPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(place / "model"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "tokenizer"),
    )
    trainer.precompute_ref_logps = precomputed  # set here: the trainer would compute them of all pairs at once
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    trainer.model.train()

    def step(batch: MicroBatch) -> float:
        assert batch.pairs is not None
        inputs = trainer.data_collator([trainer.train_dataset[number] for number in batch.pairs.numbers.tolist()])
        if precomputed:
            inputs |= {f"ref_{side}_logps": torch.full((len(batch.pairs),), -100.0) for side in ("chosen", "rejected")}
        loss = trainer.compute_loss(trainer.model, inputs)  # type: ignore[no-untyped-call]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    """Print each side's median seconds of a step, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = records(80)
    with tempfile.TemporaryDirectory(prefix="megatrain_dpo_") as folder:
        place = Path(folder)
        make(place, rows)
        batches = read_batches(place / "pairs", ROWS, SEQ_LEN)[:-1]
        sides = {
            "ours": our_step(place, len(rows)),
            "trl": their_step(place, rows, precomputed=False),
            "trl_precomputed": their_step(place, rows, precomputed=True),
        }
        wall: dict[str, list[float]] = {name: [] for name in sides}
        cpu: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 2):
            batch = batches[number % len(batches)]
            for name, step in sides.items():
                before = time.perf_counter(), time.process_time()
                step(batch)
                if number >= 2:  # after warm-up
                    wall[name].append(time.perf_counter() - before[0])
                    cpu[name].append(time.process_time() - before[1])
    for kind, seconds in (("wall", wall), ("cpu", cpu)):
        ratios = {
            f"ours / {name}": round(statistics.median(a / b for a, b in zip(seconds["ours"], times, strict=True)), 3)
            for name, times in seconds.items()
            if name != "ours"
        }
        medians = {name: round(statistics.median(times), 4) for name, times in seconds.items()}
        print(json.dumps({kind: medians, **ratios, "rounds": args.rounds, "threads": args.threads}))


if __name__ == "__main__":
    main()
