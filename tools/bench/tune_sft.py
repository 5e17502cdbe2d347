"""A step of supervised fine-tuning, ours against TRL's SFTTrainer: same weights, conversations, packing and optimizer.

    OMP_NUM_THREADS=1 python tools/bench/tune_sft.py --pairs 12

Both are in one process and take steps in turns, so drift of the machine hits both; processor time is reported, because
other programs share the machine. A step is forward, backward, clipping and AdamW over all conversations. Of TRL it is
the trainer's `training_step` with the optimizer it makes, without the loop around it, and without the recomputation of
activations that is its default. It takes `--trl-rows` packed rows at once. It lays them out as one, over which
attention is quadratic on a CPU, so one row at a time is its fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from intervals import median_interval

from megatrain.config import DataConfig, ModelConfig, PrepareConfig, TokenizerConfig, TrainConfig
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import micro_batch_of, padded_ids
from megatrain.data.preparation import prepare
from megatrain.data.samples import open_samples
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.distributed.world import join
from megatrain.engine.build import build_engine
from megatrain.interop.huggingface import export_model
from megatrain.model.init import build_model
from megatrain.resilience.heartbeat import Heartbeat

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def talks(count: int) -> list[list[dict[str, str]]]:
    """Return conversations of 2 to 6 messages of unequal length."""
    draw = random.Random(1)
    words = [f"word{number}" for number in range(400)]
    return [
        [
            {"role": role, "content": " ".join(draw.choices(words, k=draw.randrange(4, 40)))}
            for role in ["user", "assistant"] * draw.randrange(1, 4)
        ]
        for _ in range(count)
    ]


def make_base(folder: Path, arguments: argparse.Namespace) -> ModelConfig:
    """Write the conversations as a dataset (`d`) and a model with its tokenizer (`base`) into `folder`."""
    found = talks(arguments.talks)
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in found))
    (folder / "template.jinja").write_text(TEMPLATE)
    words = TokenizerConfig(
        kind="byte_level_bpe",
        vocab_size=arguments.vocab,
        chat_template=str(folder / "template.jinja"),
        special_tokens=["<|user|>", "<|assistant|>"],
    )
    train_byte_level_bpe((m["content"] for talk in found for m in talk), words).save(folder / "tokenizer")
    paths = [str(folder / "talks.jsonl")]
    data = DataConfig(name="d", dir=str(folder), kind="chat", paths=paths, heldout_fraction=0, workers=1)
    prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(kind="hf", path=str(folder / "tokenizer"))))
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = ModelConfig(
        name="bench",
        num_layers=arguments.layers,
        num_heads=arguments.width // 64,
        hidden_size=arguments.width,
        ffn_size=3 * arguments.width,
        vocab_size=max(arguments.vocab, tokenizer.vocab_size),
        max_seq_len=arguments.seq_len,
    )
    weights = {name: p.detach() for name, p in build_model(model, seed=1).named_parameters()}
    end = tokenizer.end_of_document
    export_model(model, weights, folder / "base", tokenizer_dir=folder / "d" / "tokenizer", end_of_document=end)
    return model


def our_step(folder: Path, model: ModelConfig, arguments: argparse.Namespace) -> Callable[[int], float]:
    """Return a function that does one step of ours and returns its loss."""
    dataset = IndexedDataset.open(folder / "d", "train")
    samples = open_samples(dataset, "best_fit", arguments.seq_len, verify=True)
    read = [samples.read(number, None) for number in range(samples.num_samples)]
    end = load_tokenizer(folder / "tokenizer").end_of_document
    ids = padded_ids(read, arguments.seq_len)
    batch = micro_batch_of(read, ids, end, reset_positions=True)
    filled = sum(len(sample.ids) for sample in read)
    print(f"{arguments.talks} conversations, {filled:,} tokens in {len(read)} rows of {arguments.seq_len}")
    config = TrainConfig(seed=1, model=model)
    config.engine.name, config.launch.device, config.method.name = "native", "cpu", "sft"
    config.train.seq_len, config.train.mask_documents, config.train.reset_positions = arguments.seq_len, True, True
    config.train.micro_batch_size = config.train.global_batch_size = len(read)
    config.optim.weight_decay = 0.0
    engine = build_engine(config, join(config.launch, RankEnvironment(), Heartbeat(), lambda: False))

    def step(number: int) -> float:
        result = engine.train_step([batch], 1e-5, number)
        return float(result.loss_sum) / int(result.tokens)

    return step


def their_step(folder: Path, arguments: argparse.Namespace) -> Callable[[int], float]:
    """Return a function that does one step of TRL's and returns its loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        packing=True,
        max_length=arguments.seq_len,
        per_device_train_batch_size=arguments.trl_rows,
        learning_rate=1e-5,
        bf16=False,
        use_cpu=True,
        report_to=[],
        activation_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32),
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks(arguments.talks)]),
    )
    batches = list(trainer.get_train_dataloader())
    optimizer = trainer.create_optimizer()
    count = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)

    one_step: Callable[..., torch.Tensor] = trainer.training_step

    def step(_number: int) -> float:
        loss = 0.0
        for batch in batches:
            loss += float(one_step(trainer.model, dict(batch), num_items_in_batch=count))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        trainer.model.zero_grad()
        return loss

    return step


def measure(steps: dict[str, Callable[[int], float]], pairs: int) -> dict[str, list[float]]:
    """Take steps in turns; return the seconds of processor time of each, without the first two."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, pairs + 3):
        for name in list(steps) if number % 2 else list(reversed(steps)):
            started = time.process_time()
            loss = steps[name](number)
            spent = time.process_time() - started
            if number == 1:
                print(f"{name}: loss of the first step {loss:.6f}")
            if number > 2:
                seconds[name].append(spent)
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    defaults: dict[str, Any] = dict(pairs=12, talks=48, seq_len=512, layers=4, width=256, vocab=2048, trl_rows=1)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make_base(folder, arguments)
        steps = {"megatrain": our_step(folder, model, arguments), "trl": their_step(folder, arguments)}
        seconds = measure(steps, arguments.pairs)
    for name, found in seconds.items():
        print(f"{name}: {statistics.median(found):.3f} s of processor time a step")
    ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    print(f"megatrain / trl: {median_interval(ratios)} (median of {len(ratios)} pairs, 95% interval)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
