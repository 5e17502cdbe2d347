"""Hugging Face folders: transformers computes the same from what we write, and we from what it writes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatrain.config import ExportConfig, ModelConfig, walk
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault
from megatrain.interop.hf_config import HARMLESS_FIELDS, HARMLESS_VALUES, REPEATED_FIELDS, hf_config, model_config
from megatrain.interop.hf_families import FAMILIES, UNSUPPORTED
from megatrain.interop.huggingface import export_model, import_model
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model
from megatrain.model.sampling import generate

torch.set_num_threads(1)

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
OLMO2 = {"norm_place": "after", "qk_norm": True, "qk_norm_over": "heads", "attention_bias": "all"}
GEMMA = {"activation": "geglu", "embedding_scale": 5.0, "tie_embeddings": True}
WINDOW = {"sliding_window": 7}
SHAPES = {
    "gpt2": {**GPT2, "num_heads": 4, "hidden_size": 32, "vocab_size": 61, "tie_embeddings": True},
    "gpt2 odd": {**GPT2, "num_heads": 3, "hidden_size": 21, "ffn_size": 50, "vocab_size": 101, "tie_embeddings": True},
    "gpt2 untied": {**GPT2, "num_layers": 3, "num_heads": 2, "hidden_size": 24, "vocab_size": 67, "norm_eps": 1e-3},
    "llama": {"num_heads": 4, "hidden_size": 32, "vocab_size": 61},
    "llama gqa": {"num_heads": 6, "num_kv_heads": 2, "hidden_size": 48, "ffn_size": 70, "vocab_size": 127},
    "llama tied": {"num_heads": 4, "num_kv_heads": 1, "hidden_size": 32, "vocab_size": 99, "tie_embeddings": True},
    "llama wide heads": {"num_heads": 2, "hidden_size": 32, "head_size": 24, "vocab_size": 61, "rope_theta": 500.0},
    "llama biased": {"num_heads": 4, "hidden_size": 32, "vocab_size": 61, "bias": True, "norm_eps": 1e-3},
    "qk norm": {
        "num_heads": 6,
        "num_kv_heads": 3,
        "hidden_size": 32,
        "head_size": 8,
        "vocab_size": 61,
        "qk_norm": True,
    },
    "qwen2": {"num_heads": 3, "num_kv_heads": 1, "hidden_size": 30, "vocab_size": 61, "attention_bias": "qkv"},
    "mistral": {"num_heads": 3, "num_kv_heads": 1, "hidden_size": 32, "head_size": 6, "vocab_size": 61} | WINDOW,
    "olmo2": {"num_heads": 3, "num_kv_heads": 1, "hidden_size": 30, "vocab_size": 61, **OLMO2},
    "gemma": {"num_heads": 3, "num_kv_heads": 1, "hidden_size": 25, "head_size": 8, "vocab_size": 61, **GEMMA},
}


def make_config(shape: str, **changes) -> ModelConfig:
    return ModelConfig(**{"max_seq_len": 64, "init_std": 0.2, "num_layers": 2, **SHAPES[shape], **changes})


def make_model(config: ModelConfig) -> GPT:
    """A model whose every parameter is random: norms and biases too, or a swapped pair of them would go unseen."""
    model = build_model(config, seed=7).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float(name.endswith("norm.weight")), 0.3, generator=generator)
    return model


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(params=SHAPES)
def exported(request, tmp_path) -> tuple[GPT, Path]:
    model = make_model(make_config(request.param))
    export_model(model.config, weights_of(model), tmp_path / "hf", end_of_document=1)
    return model, tmp_path / "hf"


def test_transformers_computes_the_same_logits_and_greedy_tokens(exported):
    """Within 1e-5 of logits of order one; greedy tokens through both caches, past the end of neither."""
    model, folder = exported
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs.eval()
    assert not any(report.values()), report
    assert type(theirs).__name__ == FAMILIES[theirs.config.model_type].model_class
    assert theirs.config.architectures == [type(theirs).__name__]
    tokens = torch.randint(0, model.config.vocab, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, expected = model(tokens), theirs(tokens).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for prompt in ([3, 5, 8], [2]):
        their_tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
        our_tokens = list(generate(model, prompt, max_new_tokens=20, temperature=0, stop_ids=[1]))
        assert their_tokens in (prompt + our_tokens, [*prompt, *our_tokens, 1])


def test_a_round_trip_keeps_config_and_every_bit(exported):
    model, folder = exported
    config, weights = import_model(folder)
    assert config == ModelConfig(
        **{**vars(model.config), "ffn_size": model.config.ffn_dim, "num_kv_heads": config.num_kv_heads}
    )
    assert config.kv_heads == model.config.kv_heads
    original = weights_of(model)
    assert list(weights) == list(original)
    for name, weight in weights.items():
        assert torch.equal(weight, original[name]) and weight.is_contiguous(), name


SIZES = {
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def their_model(kind: str, fields: dict):
    """transformers' own model of a family, with every parameter random."""
    torch.manual_seed(0)
    sizes = {} if kind == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **{**sizes, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float(name.endswith("norm.weight") and kind != "gemma"), 0.3)
    return model


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(tokens)
    return result if isinstance(result, torch.Tensor) else result.logits


def scaled(kind: str, **fields) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **fields}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
IMPORTED = [
    ("gpt2", {"n_embd": 21, "n_head": 3, "n_layer": 2, "n_positions": 48, "vocab_size": 61, "initializer_range": 0.2}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 14}),
    ("mistral", {"sliding_window": 7, "head_dim": 12, "hidden_size": 32}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", scaled("yarn", **YARN)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0, "head_dim": 8}),
    ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
    ("olmo2", {"attention_bias": True}),
    ("olmo2", {"num_key_value_heads": 3, **scaled("linear", factor=2.0)}),
    ("phi3", {"sliding_window": 9}),
    ("phi3", {"num_key_value_heads": 3}),
    ("gemma", {"head_dim": 14}),
    ("gemma", {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 10}),
    ("llama", scaled("linear", factor=3)),
    ("llama", scaled("dynamic", factor=2.0)),
    ("llama", scaled("yarn", **YARN, attention_factor=1.3, beta_slow=2)),
    ("llama", scaled("yarn", **YARN, mscale=0.7, mscale_all_dim=1.0, beta_fast=16, truncate=False)),
    ("llama", scaled("llama3", **LLAMA3)),
    ("mistral", scaled("llama3", **LLAMA3)),
]


@pytest.mark.parametrize(("kind", "fields"), IMPORTED)
def test_transformers_own_random_model_is_imported_and_written_back(tmp_path, kind, fields):
    """Same logits here and in what we write again, also past `max_position_embeddings`, for which RoPE is scaled."""
    theirs = their_model(kind, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    config, weights = import_model(tmp_path / "theirs")
    ours = build_model(config).eval()
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}
    generator = torch.Generator().manual_seed(2)
    export_model(config, weights, tmp_path / "again", family=kind)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(theirs)
    for length in (30,) if kind == "gpt2" else (30, 60):
        tokens = torch.randint(0, config.vocab, (2, length), generator=generator)
        expected = logits(theirs, tokens)
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(logits(ours, tokens), expected, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(logits(again, tokens), expected, rtol=0, atol=0)
    assert import_model(tmp_path / "again")[0] == config


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_each_scaling_of_rope_changes_the_logits(kind):
    """Otherwise the agreement with transformers would mean nothing."""
    tokens = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(2))
    plain, stretched = (
        make_model(make_config("llama", rope_scaling=scaling, rope_factor=4.0)) for scaling in (None, kind)
    )
    assert not torch.allclose(logits(plain, tokens), logits(stretched, tokens), atol=1e-2)


def test_generation_past_the_end_scales_dynamic_frequencies_as_transformers_does(tmp_path):
    theirs = their_model("llama", {"max_position_embeddings": 16, **scaled("dynamic", factor=4.0)})
    theirs.save_pretrained(tmp_path / "theirs")
    config, weights = import_model(tmp_path / "theirs")
    ours = build_model(config).eval()
    ours.load_state_dict(weights)
    expected = theirs.generate(torch.tensor([[3, 5]]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert [3, 5, *generate(ours, [3, 5], max_new_tokens=40, temperature=0)] == expected


def test_transformers_samples_from_the_folder_and_stops_at_the_end_of_document(tmp_path):
    model = make_model(make_config("llama"))
    first = next(generate(model, [3], max_new_tokens=1, temperature=0))
    export_model(model.config, weights_of(model), tmp_path / "hf", end_of_document=first)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.generate(torch.tensor([[3]]), max_new_tokens=9, do_sample=False).tolist() == [[3, first]]
    assert theirs.generate(torch.tensor([[4]]), max_new_tokens=9, do_sample=True).shape[1] <= 10


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_16_bit_folder_holds_the_rounded_weights(tmp_path, name, dtype):
    model = make_model(make_config("llama"))
    export_model(model.config, weights_of(model), tmp_path / "hf", dtype=name)
    _, weights = import_model(tmp_path / "hf")
    assert all(torch.equal(weights[n], w.to(dtype)) for n, w in weights_of(model).items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_a_large_model_is_written_and_read_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.interop.huggingface.MAX_SHARD_SIZE", "10KB")
    model = make_model(make_config("gpt2"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    _, weights = import_model(tmp_path / "hf")
    assert all(torch.equal(weights[n], w) for n, w in weights_of(model).items())
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    in_file: dict[str, list[str]] = {}
    for name, file in sorted(content["weight_map"].items()):
        in_file.setdefault(file, []).append(name)
    alone = next(names[0] for names in in_file.values() if len(names) == 1)
    second, names = next((file, names) for file, names in in_file.items() if len(names) > 1)

    def refusal(weight_map: dict) -> str:
        index.write_text(json.dumps({**content, "weight_map": weight_map}))
        with pytest.raises(CheckpointError) as caught:
            import_model(tmp_path / "hf")
        return str(caught.value)

    without = {name: file for name, file in content["weight_map"].items() if name != alone}
    assert f"{index.name}: tensor {alone} is missing" in refusal(without)
    without = {name: file for name, file in content["weight_map"].items() if name != names[0]}
    assert f"has no entry for tensor {names[0]}, which is in {second}" in refusal(without)
    extra = content["weight_map"] | {"transformer.h.9.ln_1.weight": second}
    assert f"{second}: tensor transformer.h.9.ln_1.weight is missing" in refusal(extra)
    (tmp_path / "hf" / second).unlink()
    assert f"{second} is missing; {index.name} says that it holds tensor {names[0]}" in refusal(content["weight_map"])
    index.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is missing.*model-00001"):
        import_model(tmp_path / "hf")


@pytest.mark.parametrize(
    ("shape", "changes", "key"),
    [
        ("gpt2", {"bias": False}, "model.bias=false"),
        ("gpt2", {"num_kv_heads": 2}, "model.num_kv_heads=2"),
        ("gpt2", {"head_size": 5}, "model.head_size=5"),
        ("gpt2", {"norm": "rmsnorm"}, "model.norm=rmsnorm"),
        ("gpt2", {"qk_norm": True}, "model.qk_norm=true"),
        ("llama", {"norm": "layernorm"}, "model.norm=layernorm"),
        ("llama", {"activation": "gelu"}, "model.activation=gelu"),
        ("llama", {"hidden_size": 34, "head_size": 8}, "model.head_size=8"),
        (
            "qk norm",
            {"bias": True},
            "bias=true cannot be exported: of the Hugging Face classes, Qwen3ForCausalLM",
        ),
        ("qk norm", {"attention_bias": "qkv"}, "model.attention_bias=qkv"),
        ("qwen2", {"bias": True}, "model.bias=true"),
        ("mistral", {"attention_bias": "all"}, "model.attention_bias=all"),
        ("olmo2", {"qk_norm_over": "head"}, "model.qk_norm_over=head"),
        ("olmo2", {"sliding_window": 8}, "model.sliding_window=8"),
        ("gemma", {"embedding_scale": 4.0}, "model.embedding_scale=4.0"),
        ("gemma", {"activation": "swiglu"}, "model.activation=swiglu"),
        ("llama", {"norm_place": "after"}, "model.qk_norm=false"),
    ],
)
def test_what_no_hugging_face_class_computes_is_refused_by_its_key(shape, changes, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        hf_config(make_config(shape, **changes), None)


MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}


@pytest.mark.parametrize(
    ("shape", "changes", "field"),
    [
        ("llama", scaled("longrope", factor=2.0, short_factor=[1.0], long_factor=[2.0]), "rope_type='longrope'.*yarn"),
        ("llama", scaled("linear", factor=0.5), "rope_parameters.factor=0.5 is out of range: must be at least 1"),
        ("llama", scaled("linear", factor=2.0, mrope_section=[2, 1, 1]), "mrope_section=.* is not a number"),
        (
            "llama",
            scaled("linear", factor=2.0, attention_factor=2),
            "attention_factor=2 has no known effect",
        ),
        ("llama", scaled("yarn", factor="long"), "rope_parameters.factor='long' with rope_type=yarn is not a number"),
        ("llama", {"rope_parameters": ["yarn"]}, "rope_parameters=.* is not an object"),
        ("llama", scaled("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 cannot"),
        ("llama", scaled("llama3", **{**LLAMA3, "low_freq_factor": None}), "low_freq_factor"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True cannot be honoured; only rope_interleaved=False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"mlp_bias": "yes"}, "mlp_bias"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads=4 is not divisible by num_key_value_heads=3"),
        ("mistral", {"attention_bias": True}, "attention_bias=True cannot be honoured; only attention_bias=False"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has full.* and sliding"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"some_new_switch": 1}, "some_new_switch=1 is not a known field.*remove it from the file"),
        ("llama", {"some_new_switch": False}, "some_new_switch=False is not a known field"),
        ("llama", {"model_type": "mixtral"}, "model_type='mixtral' cannot be imported: it has a mixture of experts"),
        ("llama", {"model_type": "unheard_of"}, "model_type='unheard_of' cannot be imported; allowed: gpt2, llama"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"attn_pdrop": 0.3}, "attn_pdrop"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        (
            "qk norm",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
            "layer_types",
        ),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(tmp_path, shape, changes, field):
    model = make_model(make_config(shape))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=field):
        import_model(tmp_path / "hf")


LLAMA_LIKE = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 61,
    "hidden_size": 30,
    "intermediate_size": 44,
    "max_position_embeddings": 48,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "smollm2": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "is_llama_config": True,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "transformers.js_config": {"dtype": "q4"},
    },
    "llama 3.2": {
        "model_type": "llama",
        "head_dim": 10,
        "mlp_bias": False,
        "eos_token_id": [1, 2],
        "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
    },
    "old llama": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}, "max_length": 20},
    "mistral": {"model_type": "mistral", "sliding_window": 4096, "_name_or_path": "somewhere"},
    "qwen2.5": {
        "model_type": "qwen2",
        "max_window_layers": 21,
        "sliding_window": 131072,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {"model_type": "qwen3", "attention_bias": False, "head_dim": 16, "max_window_layers": 28},
    "olmo2": {"model_type": "olmo2", "attention_bias": False, "pad_token_id": 3},
    "phi3": {
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 48,
        "resid_pdrop": 0.0,
        "sliding_window": 2047,
    },
    "gemma": {"model_type": "gemma", "head_dim": 16, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_files_as_they_are_published_are_read(name):
    """The fields of well-known models' config.json, with smaller sizes."""
    config = model_config({**LLAMA_LIKE, **PUBLISHED[name]}, Path("config.json"))
    assert config.dropout == 0 and config.num_heads == 3 and config.vocab_size == 61
    assert config.rope_scaling == {"llama 3.2": "llama3", "old llama": "linear"}.get(name)
    assert config.sliding_window == {"mistral": 4096, "phi3": 2047}.get(name)


def test_every_harmless_field_is_ignored_and_documented():
    fields = dict.fromkeys(HARMLESS_FIELDS - {"model_type"}, "anything")
    fields |= {name: values[0] for name, values in HARMLESS_VALUES.items()}
    base = {**LLAMA_LIKE, "model_type": "llama"}
    assert model_config({**base, **fields}, Path("config.json")) == model_config(base, Path("config.json"))
    docs = Path(__file__).parents[3] / "docs"
    page = "".join((docs / name).read_text("utf-8") for name in ("reference/models.md", "guide/after_training.md"))
    documented = (*HARMLESS_FIELDS, *REPEATED_FIELDS, *HARMLESS_VALUES, *UNSUPPORTED, *FAMILIES)
    assert not [name for name in documented if f"`{name}`" not in page]
    assert walk(ExportConfig)["family"].metadata["choices"] == tuple(FAMILIES)


def test_biases_in_attention_alone_are_not_biases_everywhere():
    config = model_config({**LLAMA_LIKE, "model_type": "llama", "attention_bias": True}, Path("config.json"))
    assert (config.bias, config.attention_bias) == (False, "all")


def test_dropout_on_attention_weights_does_not_become_dropout_everywhere(caplog):
    config = model_config({**LLAMA_LIKE, "model_type": "llama", "attention_dropout": 0.1}, Path("config.json"))
    assert config.dropout == 0
    assert "attention_dropout=0.1 is left out" in caplog.text and "set model.dropout" in caplog.text
    assert hf_config(make_config("llama", dropout=0.2), None).attention_dropout == 0


def test_older_names_of_the_same_thing_are_understood(tmp_path):
    """`rope_theta` beside the shape, as transformers 4 wrote it; GPT-2 without its prefix, with stored mask
    constants."""
    llama = make_model(make_config("llama wide heads"))
    export_model(llama.config, weights_of(llama), tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps({**fields, "rope_theta": 500.0, "rope_scaling": None, "pretraining_tp": 1}))
    assert import_model(tmp_path / "llama")[0].rope_theta == 500.0

    gpt2 = make_model(make_config("gpt2"))
    export_model(gpt2.config, weights_of(gpt2), tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(old, file)
    path = tmp_path / "gpt2" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "n_ctx": 64, "n_inner": None, "activation_function": "gelu_pytorch_tanh"}))
    config, weights = import_model(tmp_path / "gpt2")
    assert config.ffn_size == 128
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(gpt2).items())


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGE = {
    "a tensor missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "a tensor too many": (lambda t: t.update({"score.weight": torch.ones(2)}), "score.weight has no place"),
    "a wrong shape": (lambda t: t.update({"model.norm.weight": torch.ones(9)}), r"model.norm.weight has shape \(9,\)"),
    "NaN": (
        lambda t: t["model.norm.weight"].__setitem__(3, float("nan")),
        r"model\.safetensors: tensor model.norm.weight has 1 of 32 values that are NaN or infinite",
    ),
    "an infinite value": (
        lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__(0, -float("inf")),
        "model.layers.1.mlp.up_proj.weight has 32 of",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight is of torch.int8",
    ),
    "several tensors missing": (
        lambda t: [t.pop(name) for name in list(t) if "layers.1" in name or "layers.0.mlp" in name],
        "tensor model.layers.0.mlp.gate_proj.weight is missing",
    ),
    "several tensors too many": (lambda t: t.update(b=torch.ones(2), a=torch.ones(2)), "tensor a has no place"),
    "an untied head": (lambda t: t.update({"lm_head.weight": torch.ones(99, 32)}), "tie_word_embeddings is true"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_do_not_fit_their_config_are_refused_by_name(tmp_path, kind):
    model = make_model(make_config("llama tied"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    change, message = DAMAGE[kind]
    change_tensors(tmp_path / "hf", change)
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "hf")


def test_a_tied_head_that_was_stored_twice_is_taken_once(tmp_path):
    model = make_model(make_config("llama tied"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    change_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in import_model(tmp_path / "hf")[1]


def test_a_byte_order_mark_before_a_config_changes_nothing(tmp_path):
    model = make_model(make_config("llama"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    config = import_model(tmp_path / "hf")[0]
    path = tmp_path / "hf" / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert import_model(tmp_path / "hf")[0] == config


def test_pickles_and_damaged_files_are_refused_and_never_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    model = make_model(make_config("llama"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        import_model(tmp_path / "hf")
    file.unlink()
    torch.save({"a": 1}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        import_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        import_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        import_model(tmp_path / "hf")
    with pytest.raises(ConfigError, match="no such folder"):
        import_model(tmp_path / "nowhere")


def test_an_export_that_fails_leaves_nothing_and_one_that_exists_is_kept(tmp_path):
    model = make_model(make_config("llama"))
    weights = weights_of(model)
    with pytest.raises(ConfigError, match="not a saved tokenizer"):
        export_model(model.config, weights, tmp_path / "hf", tokenizer_dir=tmp_path / "none")
    assert not list(tmp_path.iterdir())
    weights.pop("final_norm.weight")
    with pytest.raises(CheckpointError, match=r"final_norm\.weight is missing"):
        export_model(model.config, weights, tmp_path / "hf")
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_model(model.config, weights_of(model), tmp_path / "hf")
    with pytest.raises(ConfigError, match="dtype=int8"):
        export_model(model.config, weights_of(model), tmp_path / "other", dtype="int8")


def test_a_full_disk_during_an_export_is_no_defect(tmp_path, monkeypatch):
    import huggingface_hub
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    model = make_model(make_config("llama"))
    with pytest.raises(EnvironmentFault, match=r"out=.*hf cannot be written .*No space left"):
        export_model(model.config, weights_of(model), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
