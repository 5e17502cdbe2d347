"""What train.mask_documents costs or gains on a CPU: python tools/bench/documents.py --model small

Three engines in one process train the same micro-batches of random tokens and take turns of one step: unmasked, by
document, and with the dense mask that attention takes where it cannot cut the sequence. A figure is the CPU time of a
step with one thread, so other processes disturb it little. The verdict is the median over the steps of a masked step
over the unmasked one, with an interval that holds the true median with 95% probability.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from intervals import median_interval

from megatrain.config import TrainConfig
from megatrain.config.compose import compose
from megatrain.data.batch import MicroBatch
from megatrain.data.loader import with_documents
from megatrain.distributed.world import World
from megatrain.engine.native import NativeEngine
from megatrain.optim.objective import NextToken

END = 0
"""The token that ends a document."""

WARM_UP = 2
"""Steps of each engine before the measured ones."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="preset of conf/model (default small)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence (default 1024)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, one micro-batch (default 4)")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each (default 12)")
    parser.add_argument("--documents", type=int, nargs="+", default=[4096, 64], help="mean tokens of a document")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of the train command")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    words = [
        f"model={arguments.model}", "model.vocab_size=8192", "engine=native", f"train.seq_len={arguments.seq_len}",
        f"train.micro_batch_size={arguments.batch}", f"train.global_batch_size={arguments.batch}", "data.name=random",
        *arguments.overrides,
    ]  # fmt: skip
    config = compose("train", words)
    assert isinstance(config, TrainConfig)
    engines = {
        name: make_engine(config, dense=name == "dense mask") for name in ("unmasked", "by document", "dense mask")
    }
    for document in arguments.documents:
        times = take_turns(engines, config, document, arguments.steps)
        print(f"documents of {document} tokens on average")
        for name, each in times.items():
            ratio = median_interval([one / other for one, other in zip(each, times["unmasked"], strict=True)])
            print(f"  {name}: {1e3 * statistics.median(each):.0f} ms a step, over unmasked {ratio}")


def make_engine(config: TrainConfig, dense: bool) -> NativeEngine:
    """Return an engine of one process on the CPU; with `dense`, its attention takes no `Documents`."""
    engine = NativeEngine(config, World(0, 1, 0, torch.device("cpu"), None), NextToken())
    for stage in engine.stages.values():
        stage.needs_dense_mask = dense
    return engine


def take_turns(
    engines: dict[str, NativeEngine], config: TrainConfig, document: int, steps: int
) -> dict[str, list[float]]:
    """Return the CPU seconds of each engine's steps. Every second step goes through the engines backwards."""
    loop, generator = config.train, torch.Generator().manual_seed(config.seed)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(1, WARM_UP + steps + 1):
        ids = torch.randint(1, config.model.vocab, (loop.micro_batch_size, loop.seq_len + 1), generator=generator)
        ids[torch.rand(ids.shape, generator=generator) < 1 / document] = END
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        for name in engines if step % 2 else reversed(engines):
            batch = MicroBatch(tokens, labels) if name == "unmasked" else with_documents(tokens, labels, END)
            began = time.process_time()
            engines[name].train_step([batch], config.optim.lr, step)
            if step > WARM_UP:
                times[name].append(time.process_time() - began)
    return times


if __name__ == "__main__":
    main()
