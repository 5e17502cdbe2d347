"""GRPO's loss and gradients equal those of TRL's GRPOTrainer on the same replies."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.hf_models import byte_tokenizer

from megatrain.config import MethodConfig
from megatrain.interop.huggingface import from_theirs, import_model
from megatrain.model.gpt import GPT
from megatrain.optim.objective import LossMeter
from megatrain.optim.policy_gradient import policy_gradient
from megatrain.reinforcement.rollout import Widths, assemble, group_advantages
from megatrain.reinforcement.sampler import reply_log_probs

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
SEQ_LEN, NEW, GROUP = 24, 8, 4
CASES = [
    {"loss": "dapo"},
    {"loss": "grpo", "kl": 0.1, "clip": 0.1, "clip_high": 0.3},
    {"loss": "dr_grpo", "kl": 0.02, "temperature": 0.7, "advantages": "none"},
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def replies():
    """Prompts and replies of different lengths, with the log-probabilities of another policy, and rewards."""
    draw = np.random.default_rng(1)
    prompts = [draw.integers(4, 260, draw.integers(3, 12)).tolist() for _ in range(3) for _ in [0]]
    prompts = [prompt for prompt in prompts for _ in range(GROUP)]
    found = [draw.integers(4, 260, draw.integers(1, NEW + 1)).tolist() for _ in prompts]
    rewards = draw.integers(0, 3, len(prompts)).astype(float)
    rewards[:GROUP] = 1.0  # a group without signal
    return prompts, found, rewards


def theirs(folder, prompts, found, rewards, old, method, reference):
    """Return TRL's loss, its gradients by name, and its metrics."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    args = GRPOConfig(
        output_dir=str(folder / "out"), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=len(prompts), num_generations=GROUP, max_completion_length=NEW,
        loss_type=method.loss, epsilon=method.clip, epsilon_high=method.clip_high, beta=method.kl,
        temperature=method.temperature, activation_checkpointing=False, scale_rewards=method.advantages,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=args,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 16),
        processing_class=byte_tokenizer(),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    longest = max(map(len, prompts))
    left = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    right = torch.tensor([ids + [0] * (NEW - len(ids)) for ids in found])
    lengths = torch.tensor([len(ids) for ids in found])
    grouped = torch.tensor(rewards).float().view(-1, GROUP)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if method.advantages == "group":
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-4)

    def padded(rows):
        return torch.tensor([row + [0.0] * (NEW - len(row)) for row in rows])

    inputs = {
        "prompt_ids": left,
        "prompt_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": right,
        "completion_mask": (torch.arange(NEW) < lengths[:, None]).long(),
        "advantages": advantages.reshape(-1),
        "old_per_token_logps": padded(old),
        "ref_per_token_logps": padded(reference),
        "num_items_in_batch": lengths.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return SimpleNamespace(loss=float(loss.detach()), gradients=gradients, metrics=metrics)


def ours(folder, prompts, found, rewards, old, method, reference):
    """Return our loss, gradients by our names, and scalars, from two micro-batches of different widths."""
    config, weights = import_model(folder)
    model = GPT(config)
    model.load_state_dict(weights, strict=True)
    rollout = assemble(prompts, found, old, group_advantages(rewards, GROUP, method.advantages), SEQ_LEN)
    if method.kl:
        rollout = rollout.with_reference(reference)
    meter = LossMeter(policy_gradient(method), torch.device("cpu"))
    rows = np.arange(len(prompts)).reshape(2, -1)
    batches = rollout.micro_batches(rows, method.loss, NEW, Widths(SEQ_LEN))
    loss = sum(meter(model, model.hidden(batch.tokens), batch) for batch in batches) / meter.count(batches)
    loss.backward()
    scalars = dict(zip(meter.objective.scalar_names, (meter.take() / rollout.num_tokens).tolist(), strict=True))
    return SimpleNamespace(loss=float(loss.detach()), model=model, scalars=scalars)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["loss"])
def test_loss_and_gradients_are_those_of_trl(model_folder, replies, case):
    prompts, found, rewards = replies
    method = MethodConfig(name="grpo", rewards=["contains"], **case)
    config, weights = import_model(model_folder)
    policy = GPT(config)
    policy.load_state_dict(weights)
    draw = np.random.default_rng(2)
    now = reply_log_probs(policy, prompts, found, method.temperature, 5)
    old = [[value + draw.normal(0, 0.2) for value in row] for row in now]
    reference = [[value + draw.normal(0, 0.3) for value in row] for row in now]
    expected = theirs(model_folder, prompts, found, rewards, old, method, reference)
    result = ours(model_folder, prompts, found, rewards, old, method, reference)
    assert result.loss == pytest.approx(expected.loss, abs=1e-5)
    gradients = from_theirs(config, "llama", expected.gradients, model_folder)
    own = {name: parameter.grad for name, parameter in result.model.named_parameters()}
    assert gradients.keys() == own.keys()
    assert max(float(g.abs().max()) for g in own.values()) > 1e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=1e-5, rtol=1e-5, msg=name)
    assert result.scalars["clip_fraction"] == pytest.approx(expected.metrics["clip_ratio/region_mean"], abs=1e-6)
    assert expected.metrics["clip_ratio/region_mean"] > 0.05
    if method.kl:
        assert result.scalars["kl"] == pytest.approx(expected.metrics["kl"], abs=1e-5)
