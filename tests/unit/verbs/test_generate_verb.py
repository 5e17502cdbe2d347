"""`megatrain generate`: the text that transformers generates from the exported folder, streamed token by token."""

import io
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megatrain
from megatrain.config import ExportConfig, GenerateConfig, ImportConfig, TokenizerConfig
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.errors import ConfigError
from megatrain.verbs import generate as generation
from megatrain.verbs.export import export_
from megatrain.verbs.generate import generate
from megatrain.verbs.import_ import import_

PROMPT = "the naïve model"


def text_of(capsys, path, **keys) -> str:
    """Return what the verb prints."""
    capsys.readouterr()
    keys = {"prompt": PROMPT, "max_new_tokens": 20, "temperature": 0.0, **keys}
    assert not generate(GenerateConfig(path=str(path), device="cpu", **keys))
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_text_is_that_of_transformers_on_the_exported_folder(name, family, tokenizer, tmp_path, capsys):
    """The ids are the same. Our tokenizer decodes them, because theirs shows a whole run of bytes as U+FFFD if one of
    them is invalid UTF-8, which a random model samples often."""
    folder, _, _ = family(name)
    export_(ExportConfig(path=str(folder), out=str(tmp_path / "hf")))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = theirs(PROMPT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        drawn = model.generate(ids, do_sample=False, max_new_tokens=20)[0]
    assert len(drawn) > ids.shape[1] + 5
    expected = tokenizer.decode(drawn.tolist()) + "\n"
    assert text_of(capsys, folder) == expected
    assert text_of(capsys, tmp_path / "hf") == expected


def test_each_end_that_a_model_came_with_ends_the_text(family, tokenizer, tmp_path, capsys):
    """A chat model names several ids; transformers stops at each of them too."""
    export_(ExportConfig(path=str(family("llama")[0]), out=str(tmp_path / "hf")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    free = model.generate(prompt, do_sample=False, max_new_tokens=20)[0].tolist()[prompt.shape[1] :]
    end = next(token for at, token in enumerate(free) if at > 4 and token not in free[:at])
    path = tmp_path / "hf" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [tokenizer.end_of_document, end]}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    drawn = model.generate(prompt, do_sample=False, max_new_tokens=20)[0].tolist()
    assert drawn[-1] == end
    expected = tokenizer.decode(drawn[:-1])
    import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "imported")))
    for folder in (tmp_path / "hf", tmp_path / "imported"):
        assert text_of(capsys, folder) == expected + "\n"
        loaded = megatrain.load(folder, device="cpu")
        assert PROMPT + loaded.generate(PROMPT, max_new_tokens=20, temperature=0) == expected
    assert text_of(capsys, tmp_path / "hf", stop_at_end=False) != expected + "\n"


def test_the_seed_determines_the_sample(family, capsys):
    folder, _, _ = family("llama")
    first, again, other = (text_of(capsys, folder, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert text_of(capsys, folder, temperature=1.0, top_k=1) == text_of(capsys, folder)


def test_text_appears_token_by_token(family, tokenizer, monkeypatch):
    """Every complete character is written before the next token is sampled, and the prompt before the first."""
    written = []
    seen = []

    class Screen(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    def drawn(model, ids, **_):
        for token in tokenizer.encode("é东 self"):
            seen.append("".join(written))
            yield token

    monkeypatch.setattr(generation, "sample", drawn)
    monkeypatch.setattr(sys, "stdout", Screen())
    generate(GenerateConfig(path=str(family("llama")[0]), prompt=PROMPT, device="cpu"))
    assert "".join(written) == PROMPT + "é东 self\n"
    assert seen[0] == PROMPT and len(set(seen)) > 3
    assert not any("\ufffd" in text for text in seen), "half a character is never shown"


def test_an_empty_prompt_starts_after_an_end_of_document(family, tokenizer, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(generation, "sample", lambda model, ids, **_: given.append(ids) or iter(()))
    assert text_of(capsys, family("llama")[0], prompt="") == "\n"
    assert given == [[tokenizer.end_of_document]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(name, family, capsys):
    with pytest.raises(ConfigError, match=r"prompt: \d+ tokens.*at most 64 \(model\.max_seq_len\)"):
        text_of(capsys, family(name)[0], prompt=PROMPT * 30)
    assert capsys.readouterr().out == "", "nothing is echoed before the refusal"


@pytest.fixture
def fills_gaps(family, tmp_path):
    """Return a checkpoint whose tokenizer has the markers of fill-in-the-middle, and that tokenizer."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(family("llama")[0], folder)
    shutil.rmtree(folder / "tokenizer")
    lines = (f"return x{i} + {i}\n" for i in range(400))
    with_markers = train_sentencepiece(lines, TokenizerConfig(vocab_size=400, fim_tokens=True))
    with_markers.save(folder / "tokenizer")
    return folder, with_markers


def test_what_is_missing_between_prompt_and_suffix_is_written(fills_gaps, monkeypatch, capsys):
    folder, tokenizer = fills_gaps
    given = []
    written = tokenizer.encode("x7")
    monkeypatch.setattr(generation, "sample", lambda model, ids, **_: given.append(ids) or iter(written))
    assert text_of(capsys, folder, prompt="return ", suffix=" + 7") == "return x7 + 7\n"
    prefix, middle, suffix = map(tokenizer.control_token, ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"))
    assert given == [[prefix, *tokenizer.encode("return "), suffix, *tokenizer.encode(" + 7"), middle]]
    assert text_of(capsys, folder, prompt="", suffix="") == "x7\n"
    model = megatrain.load(folder, device="cpu")
    assert model.generate("return ", suffix=" + 7") == "x7"


def test_a_gap_is_refused_without_its_markers_and_if_it_is_too_long(family, fills_gaps, capsys):
    with pytest.raises(ConfigError, match=r"suffix: .* no control token <\|fim_prefix\|> or .*; leave suffix out"):
        text_of(capsys, family("llama")[0], suffix=" + 7")
    with pytest.raises(ConfigError, match=r"suffix: .* no control token <PRE>"):
        text_of(capsys, fills_gaps[0], suffix="", fim_tokens=["<PRE>", "<|fim_middle|>", "<|fim_suffix|>"])
    with pytest.raises(ConfigError, match=r"fim_tokens=\['a'\]: give three names"):
        text_of(capsys, fills_gaps[0], suffix="", fim_tokens=["a"])
    with pytest.raises(ConfigError, match=r"fim_tokens=.*: </s> marks where documents begin or end"):
        text_of(capsys, fills_gaps[0], suffix="", fim_tokens=["<|fim_prefix|>", "</s>", "<|fim_suffix|>"])
    with pytest.raises(ConfigError, match=r"prompt and suffix: \d+ tokens, but the model takes at most 64"):
        text_of(capsys, fills_gaps[0], suffix=" + 7" * 60)
    assert capsys.readouterr().out == ""


def test_bytes_that_are_not_text_are_refused(family, capsys):
    with pytest.raises(ConfigError, match="not UTF-8"):
        text_of(capsys, family("llama")[0], prompt="a\udcff")
    with pytest.raises(ConfigError, match="suffix: not UTF-8"):
        text_of(capsys, family("llama")[0], suffix="a\udcff")


def test_a_model_without_a_tokenizer_is_refused(family, tmp_path, capsys):
    alone = shutil.copytree(family("llama")[0], tmp_path / "alone")
    shutil.rmtree(alone / "tokenizer")
    with pytest.raises(ConfigError, match="without a tokenizer"):
        text_of(capsys, alone)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(family, tmp_path, capsys):
    other = shutil.copytree(family("llama")[0], tmp_path / "other")
    words = [f"word{i}ing text{i * 7919}" for i in range(4000)]
    train_sentencepiece(iter(words), TokenizerConfig(vocab_size=700)).save(other / "tokenizer")
    with pytest.raises(ConfigError, match="not the one that made the model's data"):
        text_of(capsys, other)


def test_an_ensemble_writes_the_likeliest_tokens_of_the_mean_probability(family, tokenizer, capsys):
    """Of two families, each with a cache of its own: equal to computing the whole text anew for every token."""
    members = [family(name) for name in ("llama", "gpt2")]
    ids = tokenizer.encode(PROMPT)
    drawn = list(ids)
    with torch.no_grad():
        for _ in range(8):
            text = torch.tensor([drawn])
            mean = sum(model.double()(text)[0, -1].softmax(-1) for _, _, model in members)
            drawn.append(int(mean.argmax()))
    for _, _, model in members:
        model.float()
    keys = {"ensemble": [str(members[1][0])], "max_new_tokens": 8, "stop_at_end": False}
    assert text_of(capsys, members[0][0], **keys) == tokenizer.decode(drawn) + "\n"
    assert text_of(capsys, members[0][0], **keys | {"ensemble": []}) != tokenizer.decode(drawn) + "\n"
