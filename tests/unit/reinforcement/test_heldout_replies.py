"""Held-out replies are greedy: no seed changes them, and no reference or values are computed for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from support.rollouts import write_base_and_prompts

from megatrain.config import MethodConfig
from megatrain.data.chat.prompt import Prompt
from megatrain.data.chat.template import ChatTemplate
from megatrain.distributed.world import World
from megatrain.interop.load_model import load
from megatrain.reinforcement.judge import Judge
from megatrain.reinforcement.sampler import Sampler


def test_no_seed_changes_greedy_replies(tmp_path: Path) -> None:
    write_base_and_prompts(tmp_path)
    loaded = load(tmp_path / "base")
    template = ChatTemplate(loaded.need_tokenizer())
    model = loaded.build(torch.device("cpu"))
    asked = [[{"role": "user", "content": f"What is number {number}?"}] for number in range(4)]
    prompts = [Prompt(template.encode(talk, asks=True).ids, talk, {}) for talk in asked]
    judge = Judge(["ends_by_itself"], [], [], 60.0)
    world, method = World(0, 1, 0, torch.device("cpu"), None), MethodConfig(name="grpo", max_new_tokens=8)
    found = {}
    try:
        for seed in (1, 2):
            sampler = Sampler(method, seed, world, template.tokenizer, template.ends(), judge, reference=model)
            for is_greedy in (False, True):
                found[seed, is_greedy] = sampler(model, prompts, np.arange(4), is_greedy=is_greedy)
    finally:
        judge.close()
    assert found[1, True].ids == found[2, True].ids and found[1, True].reference is None
    assert found[1, False].ids != found[2, False].ids and found[1, False].reference is not None
