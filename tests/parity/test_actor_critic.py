"""PPO's loss of a policy and its value head gives the same results in every engine and layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import jobs
from support.jobs import compare, layout_job, parity_steps, rows
from support.ranks import run_ranks

from megatrain.config import MethodConfig
from megatrain.data.chat.prompt import Prompt
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model
from megatrain.reinforcement.sampler import Sampler

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"zero": 3}),
    (2, {"cp": 2, "cp_kind": "ring"}),
    (4, {"tp": 2, "pp": 2}),
]
MADE = jobs.batches


def job_of(**settings):
    """Return the config of a job by PPO, with weights that make each term of the loss count."""
    config = layout_job(**settings)
    config.method.name, config.method.value_weight, config.method.temperature = "ppo", 0.5, 0.8
    return config


def sampled(*args, **kwargs):
    """Return micro-batches whose tokens have advantages, returns and what was computed at sampling, by their ids."""

    def with_figures(batch):
        ids = batch.tokens.double()
        figures = {
            "old_log_probs": 0.3 * torch.cos(ids) - 4.6,
            "advantages": torch.sin(1.3 * ids),
            "old_values": 0.3 * torch.sin(ids),
            "returns": torch.cos(0.7 * ids) + 0.5,
        }
        return replace(batch, **{name: values.float() for name, values in figures.items()})

    return [with_figures(batch) for batch in MADE(*args, **kwargs)]


def steps(world, config, folder):
    """Run `parity_steps` on such micro-batches."""
    jobs.batches = sampled
    return parity_steps(world, config, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(steps, 1, job_of(micro=2), str(tmp_path_factory.mktemp("alone")))[0]


def test_the_value_head_begins_at_0_and_is_kept_apart_from_the_model(alone):
    start, _, end = alone[2]
    assert not start["critic.weight"].any() and end["critic.weight"].abs().min() > 0
    assert not [name for name in end if name.startswith("model.") and "value" in name]
    assert "optim.exp_avg.value.weight" in end


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_one_result(ranks, changes, alone, tmp_path):
    compare(run_ranks(steps, ranks, job_of(micro=rows(changes, ranks), **changes), str(tmp_path)), alone)


class Lengths:
    """A reward: how long a reply is."""

    models, names, num_functions = (), ("length",), 1

    def of_functions(self, replies):
        return np.array([[float(len(text))] for text in replies.completions])

    __call__ = of_functions


def replies(world):
    """Return the replies of a random model with a value head to five prompts of different lengths."""
    method = MethodConfig(name="ppo", max_new_tokens=5, generate_batch_size=2)
    base = build_model(jobs.llama(init_std=0.3), seed=3)
    model = GPT(base.config, has_values=True)
    model.load_state_dict(base.state_dict() | {"value.weight": torch.linspace(-1, 1, 24)[None]})
    tokenizer = SimpleNamespace(decode=lambda ids: "a" * len(ids))
    prompts = [Prompt(list(range(2, 4 + number)), "", {}) for number in range(5)]
    sampler = Sampler(method, 1, world, tokenizer, range(80, 101), Lengths(), build_model(base.config, seed=4))
    return sampler(model.eval(), prompts, np.arange(5))


def test_ranks_share_what_each_has_sampled_and_valued():
    (alone,) = run_ranks(replies, 1)
    assert len(set(map(len, alone.ids))) > 1 and all(map(len, alone.values))
    for found in run_ranks(replies, 2):
        assert found.ids == alone.ids and found.stopped.tolist() == alone.stopped.tolist()
        assert found.rewards.tolist() == alone.rewards.tolist()
        for name in ("log_probs", "reference", "values"):
            for row, expected in zip(getattr(found, name), getattr(alone, name), strict=True):
                np.testing.assert_allclose(row, expected, atol=1e-5, err_msg=name)
