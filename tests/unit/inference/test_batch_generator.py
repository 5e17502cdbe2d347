"""Batched generation: each reply is what transformers writes for its prompt alone, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatrain.config import ModelConfig
from megatrain.errors import ConfigError, DivergedError
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.draw import SamplingSettings
from megatrain.interop.huggingface import export_model
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model

torch.set_num_threads(1)

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True}
SHAPES = {
    "gpt2": {**GPT2, "num_heads": 4, "hidden_size": 32},
    "llama": {"num_heads": 6, "num_kv_heads": 2, "hidden_size": 48, "ffn_size": 70},
    "llama, tied, one key-value head": {"num_heads": 4, "num_kv_heads": 1, "hidden_size": 32, "tie_embeddings": True},
    "mistral": {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "sliding_window": 7},
    "olmo2": {"num_heads": 4, "hidden_size": 32, "norm_place": "after", "qk_norm": True, "qk_norm_over": "heads"},
    "llama, scaled": {"num_heads": 4, "hidden_size": 32, "rope_scaling": "linear", "rope_factor": 4.0},
}
SYSTEM = [7, 8, 9, 10, 11, 12]


def make_model(shape: str = "llama", **changes) -> GPT:
    base = {"max_seq_len": 96, "vocab_size": 61, "init_std": 0.3, "num_layers": 2}
    return build_model(ModelConfig(**{**base, **SHAPES[shape], **changes}), seed=7).eval()


def make_prompts(number: int, longest: int = 40) -> list[list[int]]:
    """Prompts of all lengths, of which a third begin alike."""
    draw = random.Random(3)
    prompts = [[draw.randrange(61) for _ in range(draw.randint(1, longest))] for _ in range(number)]
    return [SYSTEM + prompt if at % 3 == 0 else prompt for at, prompt in enumerate(prompts)]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_replies_are_those_of_transformers_batched_or_alone(shape, tmp_path):
    """More requests than slots, prompts in several chunks, prefixes reused, replies of different lengths."""
    model = make_model(shape)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export_model(model.config, weights, tmp_path / "hf", end_of_document=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompts = make_prompts(14)
    settings = [SamplingSettings(5 + 3 * at, temperature=0) for at in range(len(prompts))]
    expected = [
        theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),  # an id 0 is no padding
            max_new_tokens=one.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt, one in zip(prompts, settings, strict=True)
    ]
    together = BatchGenerator(model, num_slots=4, capacity=96, chunk=11)
    assert [reply.ids for reply in together.run(prompts, settings)] == expected
    assert together.counts.reused_tokens > 0
    alone = BatchGenerator(model, num_slots=1, capacity=96, reuse_prefixes=False)
    assert [reply.ids for reply in alone.run(prompts, settings)] == expected


def test_log_probabilities_are_those_of_the_whole_sequence_computed_at_once():
    """At the temperature of sampling, before top_k and top_p: what a policy's gradient needs."""
    model = make_model()
    prompts = make_prompts(9)
    settings = [SamplingSettings(12, temperature=0.7, top_k=9, top_p=0.9, seed=seed) for seed in range(len(prompts))]
    for prompt, reply in zip(prompts, BatchGenerator(model, 3, 64, chunk=16).run(prompts, settings), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply.ids]))[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(reply.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(reply.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_a_sampled_reply_depends_on_its_request_and_not_on_the_batch():
    model, prompts = make_model(), make_prompts(20)
    settings = [SamplingSettings(15, seed=seed) for seed in range(len(prompts))]
    together = BatchGenerator(model, 7, 64, chunk=20).run(prompts, settings)
    alone = [BatchGenerator(model, 1, 64).run([prompt], one)[0] for prompt, one in zip(prompts, settings, strict=True)]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
    other = BatchGenerator(model, 7, 64).run(prompts, [SamplingSettings(15, seed=99)] * len(prompts))
    assert [reply.ids for reply in other] != [reply.ids for reply in alone]


def test_replies_to_one_prompt_compute_it_once():
    model, prompt = make_model(), make_prompts(1)[0]
    generator = BatchGenerator(model, 8, 64)
    replies = generator.run([prompt] * 8, [SamplingSettings(10, seed=seed) for seed in range(8)])
    assert generator.counts.prompt_tokens == len(prompt) + 7 and len({tuple(reply.ids) for reply in replies}) == 8


def test_a_conversation_that_goes_on_computes_only_what_is_new():
    model, first = make_model(), make_prompts(1)[0]
    generator = BatchGenerator(model, 2, 96)
    reply = generator.run([first], SamplingSettings(10, temperature=0))[0]
    before = generator.counts.prompt_tokens
    longer = [*first, *reply.ids, 1, 2, 3]
    again = generator.run([longer], SamplingSettings(10, temperature=0))[0]
    assert generator.counts.prompt_tokens - before == 4, "the last id of the reply was never computed"
    assert again.ids == BatchGenerator(model, 1, 96).run([longer], SamplingSettings(10, temperature=0))[0].ids


def test_a_reply_ends_with_a_stop_id_and_says_so():
    model, prompt = make_model(), [1, 2]
    free = BatchGenerator(model, 1, 64).run([prompt], SamplingSettings(12, seed=4))[0]
    assert (len(free.ids), free.finish) == (12, "length")
    stop = free.ids[5]
    stopped = BatchGenerator(model, 1, 64).run([prompt], SamplingSettings(12, seed=4, stop_ids=frozenset([stop])))[0]
    assert (stopped.ids, stopped.finish) == (free.ids[: free.ids.index(stop) + 1], "stop")


def test_cancelled_requests_free_their_slots_and_leave_the_others_alone():
    """At every step a request is cancelled: some wait, some are in their prompts, some are being generated."""
    model, prompts, draw = make_model(), make_prompts(40), random.Random(5)
    alone = BatchGenerator(model, 1, 96, reuse_prefixes=False)
    generator = BatchGenerator(model, 5, 96, chunk=13)
    settings = SamplingSettings(20, temperature=0)
    numbers = {generator.add(prompt, settings): prompt for prompt in prompts}
    found, cancelled = {number: [] for number in numbers}, set()
    while generator.num_active or generator.num_waiting:
        for token in generator.step():
            found[token.request].append(token.id)
        number = draw.choice(list(numbers))
        if draw.random() < 0.4 and generator.cancel(number):
            assert not generator.cancel(number)
            cancelled.add(number)
    assert 5 < len(cancelled) < 35
    for number in numbers.keys() - cancelled:
        assert found[number] == alone.run([numbers[number]], settings)[0].ids


def test_a_reply_of_nan_ends_its_request_only_and_leaves_nothing_behind():
    """A slot's NaN would spread to whatever comes into the slot next, through weights of 0."""
    model, settings = make_model(), SamplingSettings(8, temperature=0)
    prompts = [[*range(5, 20)], [1, 2, 3], [4, 4]]
    expected = BatchGenerator(model, 2, 64).run(prompts, settings)
    bad = next(iter(set(range(20, 61)) - {token for reply in expected for token in reply.ids}))
    with torch.no_grad():
        model.embed.weight[bad] = torch.nan
    generator = BatchGenerator(model, 2, 64)
    for _ in range(2):
        generator.add([1, 2, 1, 2, bad, 3, 4, 5, 6, 7], settings)
    assert {token.finish for token in generator.step()} | {token.finish for token in generator.step()} == {"error"}
    assert generator.num_active == generator.num_waiting == 0
    with pytest.raises(DivergedError, match="NaN"):
        generator.run([[bad]], settings)
    assert generator.run(prompts, settings) == expected


def test_weights_that_changed_are_used_after_forget():
    model, prompt = make_model(), make_prompts(1)[0]
    generator = BatchGenerator(model, 2, 96)
    settings = SamplingSettings(10, temperature=0)
    generator.run([prompt], settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    generator.forget()
    assert generator.run([prompt], settings) == BatchGenerator(model, 2, 96).run([prompt], settings)


def test_requests_that_do_not_fit_are_refused():
    model = make_model()
    generator = BatchGenerator(model, 2, 20)
    assert len(generator.run([[1] * 11], SamplingSettings(10))[0].ids) == 10
    for prompt, settings, words in (
        ([1] * 12, SamplingSettings(10), "do not fit 20 tokens"),
        ([], SamplingSettings(1), "no tokens"),
        ([61], SamplingSettings(1), "vocabulary of 61"),
    ):
        with pytest.raises(ConfigError, match=words):
            generator.add(prompt, settings)
    with pytest.raises(ConfigError, match="temperature=-1"):
        SamplingSettings(1, temperature=-1)
    with pytest.raises(ConfigError, match="rope_scaling=dynamic"):
        BatchGenerator(make_model(rope_scaling="dynamic", rope_factor=2.0), 2, 97)
