"""Tokenizers are trained by stated rules, lose no text, and are for transformers what they are for us."""

import io
import json
import random
import re
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from megatrain.config import TokenizerConfig
from megatrain.data.byte_level_bpe import ByteLevelBpe
from megatrain.data.corpus.normalise import normalise
from megatrain.data.special_tokens import FIM_TOKENS, chat_template, special_tokens
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.tokenizer_training import check_training, train_tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.interop.hf_tokenizer import export_tokenizer

CHINESE = "今天天气很好，我们一起去公园散步，看到很多孩子在湖边放风筝。共 1234567 人，２０２４年。\n"
KINDS = ("sentencepiece", "unigram", "byte_level_bpe")
RULES = {
    "default": {},
    "runs": {"digits": "threes", "whitespace": "runs", "punctuation": "apart"},
    "single": {"digits": "single", "whitespace": "single"},
}
CONTROL = {"fim_tokens": True, "reserved_tokens": 2, "special_tokens": ["[INST]"], "chat_template": "chatml"}


def stdlib_texts() -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [normalise(file.read_text(encoding="utf-8", errors="replace")) for file in files]


TEXTS = [*stdlib_texts()[:8], CHINESE * 40, "x\t\ty 12 345 6789 1000000\n\n\n" * 40]


def train(**settings):
    return train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=1200, **settings), False)


@pytest.fixture(scope="module", params=[(kind, rules) for kind in KINDS for rules in RULES], ids="-".join)
def trained(request):
    kind, rules = request.param
    return kind, RULES[rules], train(kind=kind, **RULES[rules], **CONTROL)


def exported(tokenizer, folder):
    tokenizer.save(folder / "own")
    (folder / "hf").mkdir()
    export_tokenizer(folder / "own", folder / "hf", 10**6)
    return AutoTokenizer.from_pretrained(folder / "hf")


def random_text(rng):
    planes = [(0x20, 0x7F), (0xA0, 0x2FF), (0x300, 0xD800), (0x4E00, 0x9FFF), (0xE000, 0x110000)]
    parts = [" ", "  ", "\n", "\t", "12", "the", "def ", "▁", "<|im_start|>", "</s>", "<0x41>", "e\u0301", "\u200d"]
    chosen = [
        rng.choice(parts) if rng.random() < 0.6 else chr(rng.randrange(*rng.choice(planes)))
        for _ in range(rng.randrange(80))
    ]
    return normalise("".join(chosen))


def test_random_unicode_comes_back(trained):
    _, _, tokenizer = trained
    rng = random.Random(3)
    controls = {tokenizer.end_of_document, *(tokenizer.control_token(name) for name in special_tokens(config(), []))}
    for _ in range(300):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, ascii(text)
        assert controls.isdisjoint(ids), ascii(text)


def config():
    return TokenizerConfig(**CONTROL)


def test_transformers_gives_the_same_ids(trained, tmp_path):
    """On code that was not seen, Chinese, random Unicode, and text that spells every control token and byte."""
    _, _, tokenizer = trained
    theirs = exported(tokenizer, tmp_path)
    rng = random.Random(4)
    spelled = " a".join([*special_tokens(config(), []), "<unk>", "</s>", "<s>", *(f"<0x{b:02X}>" for b in range(256))])
    texts = [*stdlib_texts()[20:30], CHINESE, spelled, *(random_text(rng) for _ in range(100))]
    for text in texts:
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ids == tokenizer.encode(text), ascii(text[:200])
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_of_document


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_chat_template_transformers_finds_no_control_token_in_text(kind, tmp_path):
    tokenizer = train(kind=kind, fim_tokens=True)
    theirs = exported(tokenizer, tmp_path)
    text = "a<|fim_prefix|>b</s><|endoftext|>"
    assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


def tokens(tokenizer, text):
    """Return the bytes of each token that is used for a text."""
    found = []
    for token in set(tokenizer.encode(text)):
        piece = tokenizer.decode([token])
        if "\ufffd" not in piece:
            found.append(piece)
    return found


def test_the_rules_hold_in_every_token(trained):
    """In the tokens of all texts: digits together, whitespace beside other characters, letters beside punctuation."""
    kind, rules, tokenizer = trained
    pieces = [piece for text in [*TEXTS, *stdlib_texts()[20:60]] for piece in tokens(tokenizer, text)]
    digits = max(len(run) for piece in pieces for run in re.findall(r"\d+", piece))
    assert {"threes": digits == 3, "single": digits == 1}.get(rules.get("digits"), digits > 3)
    whitespace = {piece for piece in pieces if re.search(r"[\n\t]|  ", piece)}
    if rules.get("whitespace") == "single":
        assert whitespace <= {"\n", "\t"}
    elif rules.get("whitespace") == "runs":
        assert all(re.fullmatch(r"\n+|\t+| +", piece) for piece in whitespace if kind == "byte_level_bpe")
        assert not any(re.search(r"[\n\t][^\n\t]|[^\n\t][\n\t]", piece) for piece in whitespace)
        assert kind == "unigram" or any(re.fullmatch(r"\n{2,}", piece) for piece in whitespace)
    else:
        assert any(re.fullmatch(" {2,}", piece) for piece in whitespace)
        assert any(re.search(r"\S\n", piece) for piece in whitespace)
    joined = any(re.search(r"[a-z][(.,:]|[(.,:][a-z]", piece) for piece in pieces)
    assert joined == (rules.get("punctuation") != "apart")


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_laid_out_with_control_tokens(kind, tmp_path):
    tokenizer = train(kind=kind, chat_template="chatml")
    theirs = exported(tokenizer, tmp_path)
    assert "chat_template" in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    rendered = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert theirs.apply_chat_template(chat, tokenize=False) == rendered
    start, end = tokenizer.control_token("<|im_start|>"), tokenizer.control_token("<|im_end|>")
    ids = theirs.apply_chat_template(chat, tokenize=True)["input_ids"]
    assert [token for token in ids if token in (start, end)] == [start, end, start, end]
    assert {start, end}.isdisjoint(tokenizer.encode(rendered))
    asked = theirs.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_other_built_in_chat_template():
    tokenizer = train(kind="byte_level_bpe", chat_template="llama3")
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "user", "content": " Hi "}]
    template = tokenizer._folder.chat_template()
    rendered, _ = render_jinja_template([chat], chat_template=template, add_generation_prompt=True)
    user = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert rendered == [f"{user}<|start_header_id|>assistant<|end_header_id|>\n\n"]
    assert tokenizer.control_token("<|eot_id|>") is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_of_ones_own_survives_saving_and_loading(kind, tmp_path):
    generated = "<|turn|>{{ m.content }}{% generation %}{% endgeneration %}"
    (tmp_path / "t.jinja").write_text(f"{{% for m in messages %}}{generated}{{% endfor %}}")
    tokenizer = train(kind=kind, chat_template=str(tmp_path / "t.jinja"))
    assert tokenizer.control_token("<|turn|>") is not None
    tokenizer.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("a", "b"):
        assert "<|turn|>" in json.loads((tmp_path / name / "tokenizer_config.json").read_text())["chat_template"]
    assert find_tokenizer(tokenizer.kind, str(tmp_path / "a")).fingerprint == tokenizer.fingerprint


def test_a_marker_with_an_expression_is_no_name(tmp_path):
    template = "{% for m in messages %}<|{{m.role}}|>{{ m.content }}<|end|>{% endfor %}"
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8-sig")
    settings = TokenizerConfig(chat_template=str(tmp_path / "t.jinja"))
    assert special_tokens(settings, []) == ["<|end|>"] and chat_template(settings) == template


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_have_the_first_ids_in_the_order_of_the_config(kind):
    tokenizer = train(kind=kind, **CONTROL)
    names = [*FIM_TOKENS, "<|im_start|>", "<|im_end|>", "[INST]", "<|reserved_0|>", "<|reserved_1|>"]
    first = 1 if kind == "byte_level_bpe" else 2
    assert [tokenizer.control_token(name) for name in names] == list(range(first, first + len(names)))
    assert tokenizer.control_token("the") is None
    assert tokenizer.decode([tokenizer.control_token("[INST]")]) == ""


def test_byte_level_bpe_is_encoded_by_tiktoken_too(trained):
    kind, _, tokenizer = trained
    if kind == "byte_level_bpe":
        engine = ByteLevelBpe(tokenizer._definition, tokenizer.encode)
        texts = [*stdlib_texts()[20:30], CHINESE]
        assert [engine(text).tolist() for text in texts] == [tokenizer.encode(text) for text in texts]


def test_merges_are_those_of_the_library_itself():
    """The oracle: the same text, cut by the same pattern, trained by a plain call of the library."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    ours = json.loads(train(kind="byte_level_bpe", digits="threes")._definition)
    gpt4 = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(gpt4), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    library.train_from_iterator(TEXTS, trainer)
    assert ours["model"] == json.loads(library.to_str())["model"]


def test_rounded_scores_of_a_unigram_model_are_near_those_of_the_library():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="unigram", vocab_size=300, hard_vocab_limit=False
    )
    from megatrain.data.train_sentencepiece import _rounded

    before, after = sentencepiece_model_pb2.ModelProto(), sentencepiece_model_pb2.ModelProto()
    before.ParseFromString(model.getvalue())
    after.ParseFromString(_rounded(model.getvalue()))
    assert [piece.piece for piece in before.pieces] == [piece.piece for piece in after.pieces]
    for old, new in zip(before.pieces, after.pieces, strict=True):
        assert abs(old.score - new.score) <= 1 / 512 and (new.score * 256).is_integer()


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"kind": "hf"}, ConfigError, "tokenizer=hf is loaded from a path.*tokenizer=byte_level_bpe"),
        ({"special_tokens": ["word"]}, ConfigError, "'word' cannot be a control token"),
        ({"special_tokens": ["<a b>"]}, ConfigError, "'<a b>' cannot be a control token"),
        ({"special_tokens": ["<0x41>"]}, ConfigError, "'<0x41>' cannot be a control token"),
        ({"special_tokens": ["<|a|>", "<|a|>"]}, ConfigError, r"<\|a\|> is given twice"),
        ({"special_tokens": [f"<{'x' * 70}>"]}, ConfigError, "more than 64 characters"),
        ({"chat_template": "chatmk"}, ConfigError, "chat_template=chatmk: no such file.*chatml, llama3"),
        ({"chat_template": "{tmp}/bad.jinja"}, ConfigError, r"not a Jinja template \(line 2"),
        ({"chat_template": "{tmp}/latin.jinja"}, ConfigError, "not a text in UTF-8"),
        ({"chat_template": "{tmp}/filter.jinja"}, ConfigError, r"not a Jinja template \(line 1: No filter named"),
        ({"chat_template": "{tmp}/deep.jinja"}, ConfigError, "not a Jinja template .*nested too deeply"),
        ({"chat_template": "{tmp}/empty.jinja"}, ConfigError, "does not use `messages`"),
        ({"chat_template": "{tmp}/marker.jinja"}, ConfigError, r"chat_template: '<\|a▁b\|>' cannot be a control token"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_text_is_read(tmp_path, settings, error, message):
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    (tmp_path / "filter.jinja").write_text("{{ messages | lengthh }}")
    (tmp_path / "deep.jinja").write_text("{{ messages" + "[" * 10**4)
    (tmp_path / "empty.jinja").write_text("")
    (tmp_path / "marker.jinja").write_text("{{ messages }}<|a▁b|>")
    given = {name: v.format(tmp=tmp_path) if isinstance(v, str) else v for name, v in settings.items()}
    with pytest.raises(error, match=message):
        check_training(TokenizerConfig(**given))


@pytest.mark.parametrize(
    "texts, settings, error, message",
    [
        (TEXTS, {"kind": "byte_level_bpe", "vocab_size": 300, "reserved_tokens": 50}, ConfigError, "51 control tokens"),
        ([""], {"kind": "byte_level_bpe"}, DataError, "is empty"),
        (["\n\n"], {"kind": "unigram"}, DataError, "nothing but line ends"),
        (["a b"] * 9, {"vocab_size": 300, "reserved_tokens": 50}, DataError, r"give tokenizer.vocab_size=\d+ or more"),
    ],
)
def test_what_does_not_fit_is_refused(texts, settings, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(iter(texts), TokenizerConfig(**settings), False)


@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_there_if_asked_for(kind):
    tokenizer = train_tokenizer(iter(TEXTS), TokenizerConfig(kind=kind, vocab_size=900), True)
    assert tokenizer.beginning_of_document is not None and not tokenizer.starts_with_bos
