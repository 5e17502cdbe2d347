"""Losses and gradients equal TRL's: of preferences, from the same records on, and of distillation."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset

from megatrain.interop.load_model import load
from megatrain.kernels.distillation import Teaching, chunked_linear_distillation
from megatrain.optim.preferences import DirectPreference, PairReward

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "bench"))
from trl_pairs import TRL_OPTIONS, make_dataset, make_tokenizer, pair, read_batches

CPU = torch.device("cpu")
NAMES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "mlp": "mlp",
    **{name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")},
}
TOLERANCE = 1e-5


def records(count=12, even=False):
    """Conversational pairs; with `even` the chosen replies have equally many tokens."""
    draw = random.Random(3)
    for number in range(count):
        sides = [" ".join(draw.choice("abcd") for _ in range(draw.randrange(1, 6))) for _ in range(2)]
        sides = [draw.choice("xyz") if even else f"yes {sides[0]}", f"no {sides[1]}"]
        yield pair(f"say {number}", *sides)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models of transformers in folders with one tokenizer, and datasets of the pairs."""
    place = tmp_path_factory.mktemp("trl")
    tokenizer = make_tokenizer(place, list(records()), 300)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape)
    config.pad_token_id = tokenizer.pad_token_id
    config.num_labels = 1
    torch.manual_seed(2)
    transformers.LlamaForSequenceClassification(config).save_pretrained(place / "scores")
    tokenizer.save_pretrained(place / "scores")
    for seed, name in enumerate(("model", "reference")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    for name, even in (("even", True), ("uneven", False)):
        make_dataset(place, name, list(records(even=even)))
    return place


def our_batch(place, name):
    """All pairs of a dataset in one micro-batch, several in a row."""
    (batch,) = read_batches(place / name, rows=12, seq_len=128)
    assert len(batch.pairs) == 12
    return batch


def ours(model, objective, batch):
    """The mean loss and the gradients, by the names of transformers."""
    hidden = model.hidden(batch.tokens, positions=batch.positions, documents=batch.documents)
    loss, _ = objective(model, hidden, batch)
    (loss / objective.count(batch)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        place = re.sub(r"^blocks\.", "layers.", name)
        place = ".".join(NAMES.get(part, part) for part in place.split("."))
        place = place.replace("embed.", "embed_tokens.").replace("final_norm", "norm")
        found[place.replace("head.", "lm_head.")] = parameter.grad
    return float(loss.detach()) / objective.count(batch), found


def theirs(trainer, batches):
    """The mean of the losses of TRL's trainer over batches, and its gradients."""
    total = 0.0
    for rows in batches:
        inputs = trainer.data_collator([trainer.train_dataset[row] for row in rows])
        loss = trainer.compute_loss(trainer.model, inputs) / len(batches)
        loss.backward()
        total += float(loss.detach())
    return total, {name.removeprefix("model."): p.grad for name, p in trainer.model.named_parameters()}


def assert_equal(mine, expected):
    (loss, gradients), (true_loss, true_gradients) = mine, expected
    assert loss == pytest.approx(true_loss, rel=TOLERANCE)
    assert gradients.keys() == true_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in true_gradients.values())
    assert largest > 1e-3
    for name, gradient in true_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=TOLERANCE, atol=TOLERANCE * largest, msg=name)


@pytest.mark.parametrize(
    ("losses", "data", "batches"),
    [
        (["sigmoid"], "uneven", [range(12)]),
        (["sigmoid", "sft"], "even", [range(12)]),
        # TRL's supervised term is a mean over a batch's tokens: of each pair alone it is ours, however batches are cut
        (["sigmoid", "sft"], "uneven", [[row] for row in range(12)]),
    ],
    ids=str,
)
def test_dpo(place, tmp_path, losses, data, batches):
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    args = DPOConfig(output_dir=str(tmp_path), beta=0.3, loss_type=losses, **TRL_OPTIONS)
    read = transformers.AutoModelForCausalLM.from_pretrained
    trainer = DPOTrainer(
        model=read(place / "model"),
        ref_model=read(place / "reference"),
        args=args,
        train_dataset=Dataset.from_list(list(records(even=data == "even"))),
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "tokenizer"),
    )
    trainer.model.eval()
    objective = DirectPreference(0.3, 0.0, float("sft" in losses))
    batch = our_batch(place, data)
    with objective.reference.recording(12, CPU) as recorded, torch.no_grad():
        model = load(place / "reference").build(CPU)
        objective(model, model.hidden(batch.tokens, positions=batch.positions, documents=batch.documents), batch)
        objective.reference.log_probs = recorded[:, :2].float()
    assert_equal(ours(load(place / "model").build(CPU), objective, batch), theirs(trainer, batches))


@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_reward(place, tmp_path, centering):
    from trl import RewardConfig, RewardTrainer  # type: ignore[attr-defined]

    args = RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=centering or None, **TRL_OPTIONS)
    trainer = RewardTrainer(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(place / "scores"),
        args=args,
        train_dataset=Dataset.from_list(list(records())),
        processing_class=transformers.AutoTokenizer.from_pretrained(place / "tokenizer"),
    )
    trainer.model.eval()
    loaded = load(place / "scores")
    assert loaded.config.output == "score"
    mine = ours(loaded.build(CPU), PairReward(centering=centering), our_batch(place, "uneven"))
    assert_equal(mine, theirs(trainer, [range(12)]))


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_distillation(mix):
    """The divergence from the same hidden states; the factor T^2 is ours alone."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    draw = torch.Generator().manual_seed(4)
    x, weight, theirs, table = (
        torch.randn(*shape, generator=draw) for shape in ((3, 7, 5), (17, 5), (3, 7, 8), (17, 8))
    )
    labels = torch.randint(0, 17, (3, 7), generator=draw)
    labels[:, ::3] = -100
    x.requires_grad_()
    weight.requires_grad_()
    expected, _, count = _chunked_divergence_loss(x, theirs, weight, table, labels != -100, mix, temperature=2.0)
    teaching = Teaching(theirs, table, temperature=2.0, share=1.0, mix=mix)
    loss, _, divergence = chunked_linear_distillation(x, weight, labels, None, teaching)
    torch.testing.assert_close(divergence / count, expected.detach(), rtol=TOLERANCE, atol=0)
    mine = torch.autograd.grad(loss / count / 4, [x, weight])
    for one, other in zip(mine, torch.autograd.grad(expected, [x, weight]), strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)
