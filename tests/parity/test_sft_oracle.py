"""Supervised fine-tuning against TRL: the same conversations give its trainer's loss and gradients, packed or not."""

from __future__ import annotations

import json
import random

import pytest
import torch

from megatrain.config import DataConfig, ModelConfig, PrepareConfig, TokenizerConfig
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import micro_batch_of, padded_ids
from megatrain.data.preparation import prepare
from megatrain.data.samples import open_samples
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.engine.common import summed_loss
from megatrain.interop.huggingface import export_model, from_theirs
from megatrain.model.init import build_model
from megatrain.optim.objective import LossMeter, NextToken

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
T = 96


def talks():
    draw = random.Random(1)
    for number in range(24):
        yield [
            {"role": role, "content": f"{draw.choice(['say', 'name'])} {number} " + "very " * draw.randrange(6)}
            for role in ["user", "assistant"] * draw.randrange(1, 4)
        ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return a folder with conversations as a dataset (`d`) and a small Llama with its tokenizer as a base (`base`)."""
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks()))
    (folder / "template.jinja").write_text(TEMPLATE)
    words = TokenizerConfig(
        kind="byte_level_bpe",
        vocab_size=300,
        chat_template=str(folder / "template.jinja"),
        special_tokens=["<|user|>", "<|assistant|>"],
    )
    texts = (message["content"] for talk in talks() for message in talk)
    train_byte_level_bpe(texts, words).save(folder / "tokenizer")
    data = DataConfig(
        name="d", dir=str(folder), kind="chat", paths=[str(folder / "talks.jsonl")], heldout_fraction=0, workers=1
    )
    prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(kind="hf", path=str(folder / "tokenizer"))))
    vocab = load_tokenizer(folder / "tokenizer").vocab_size
    model = ModelConfig(
        name="t", num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, ffn_size=48, vocab_size=vocab,
        max_seq_len=T, init_std=0.1,
    )  # fmt: skip
    weights = {name: p.detach() for name, p in build_model(model, seed=1).named_parameters()}
    end = load_tokenizer(folder / "tokenizer").end_of_document
    export_model(model, weights, folder / "base", tokenizer_dir=folder / "d" / "tokenizer", end_of_document=end)
    return folder, model


def ours(folder, config):
    """Return the mean loss over the replies of all conversations, packed as in training, and the gradients."""
    dataset = IndexedDataset.open(folder / "d", "train")
    samples = open_samples(dataset, "best_fit", T, verify=True)
    read = [samples.read(number, None) for number in range(samples.num_samples)]
    assert any(len(sample.pieces) > 1 for sample in read), "conversations share a window"
    end = load_tokenizer(folder / "tokenizer").end_of_document
    batch = micro_batch_of(read, padded_ids(read, T), end, reset_positions=True)
    model = build_model(config, seed=1)
    meter = LossMeter(NextToken(), torch.device("cpu"))
    loss = summed_loss(model, batch, None, meter, model) / meter.count([batch])
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def theirs(folder, config, packing, **further):
    """Return the same of TRL's trainer, with our names."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    settings = SFTConfig(
        output_dir=str(folder / f"trl-{packing}"), assistant_only_loss=True, packing=packing, max_length=T,
        per_device_train_batch_size=24, bf16=False, use_cpu=True, report_to=[], activation_checkpointing=False,
        **further,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": talk} for talk in talks()]),
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return float(loss.detach()), from_theirs(config, "llama", gradients, folder)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_loss_and_gradients_are_those_of_trl(prepared, packing):
    folder, config = prepared
    loss, gradients = ours(folder, config)
    their_loss, their_gradients = theirs(folder, config, packing)
    assert loss == pytest.approx(their_loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-5)
