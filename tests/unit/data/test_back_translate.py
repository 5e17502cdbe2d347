"""Back-translation gives the text that transformers alone gives, sentence by sentence, with models of any kind."""

import io
import json
import re

import pytest
import sentencepiece as spm
import torch
import transformers

from megatrain.config import TokenizerConfig
from megatrain.data.corpus.augmentation import sentences
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.errors import ConfigError

ENGLISH = (
    'Dr. Smith went home. "Was it late?" he asked. It was! They ate bread (and cheese.) Nobody spoke of J. Doe again.\n'
    "    A second line, e.g. this one, stays below. It has two sentences.\n\nThe end."
)
CHINESE = "今天天气很好。我们去公园散步！你来吗？他说：“我来。”大家都很高兴……\n第二段只有一句话"


def step(**parameters):
    return build_recipe([{"back_translate": {"rate": 1.0, **parameters}}])[0]


def changed(one, text):
    document = Document(text, "d")
    assert one.apply(document) is None
    return document.text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny models of random weights, a T5 and a Marian: they translate nonsense, but each text always the same."""
    folder = tmp_path_factory.mktemp("models")
    train_byte_level_bpe([ENGLISH, CHINESE], TokenizerConfig(kind="byte_level_bpe", vocab_size=300)).save(
        folder / "own"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "own")
    tokenizer.pad_token = tokenizer.eos_token
    others = [token for token in range(1, 300) if not re.fullmatch("[a-z]", tokenizer.decode([token]))]
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **sizes)
    marian = transformers.MarianConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.8, **sizes,
    )  # fmt: skip
    for name, config in (("t5", t5), ("marian", marian)):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        model.generation_config.suppress_tokens = others if name == "marian" else [0, *others]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def translate(folder, text, limit, source=None, **options):
    """The oracle: one sentence at a time by transformers alone; empty if it is too long."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **({"src_lang": source} if source else {}))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    inputs = tokenizer([text], return_tensors="pt")
    if inputs["input_ids"].shape[1] > limit:
        return ""
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, num_beams=1,
        max_new_tokens=limit, **options,
    )  # fmt: skip
    written = ids[0, 2:] if options else ids[0]  # without the start and the language
    return " ".join(tokenizer.decode(written, skip_special_tokens=True).split())


@pytest.mark.parametrize("there, back", [("t5", "marian"), ("marian", "t5")])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_each_sentence_is_translated_there_and_back(models, there, back, text):
    one = step(there=str(models / there), back=str(models / back), there_prefix=">> ", max_tokens=60)
    result = changed(one, text)
    expected = []
    for line in text.split("\n"):
        for sentence, gap in sentences(line):
            foreign = translate(models / there, f">> {sentence}", 60) if sentence else ""
            again = translate(models / back, foreign, 60) if foreign else ""
            expected += [again or sentence, gap]
        expected.append("\n")
    assert result == "".join(expected[:-1])
    assert result == changed(one, text)
    assert not any(sentence in result for line in text.split("\n") for sentence, _ in sentences(line) if sentence)
    batched = step(there=str(models / there), back=str(models / back), there_prefix=">> ",
                   max_tokens=60, batch_size=1)  # fmt: skip
    assert changed(batched, text) == result


@pytest.fixture(scope="module", params=["nllb", "m2m100"])
def many_languages(request, tmp_path_factory):
    """A tiny model of many languages of random weights: its folder, two codes and the ids of their tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(set(ENGLISH) | {"▁"})]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    codes = ("eng_Latn", "fra_Latn") if request.param == "nllb" else ("en", "fr")
    if request.param == "nllb":
        tokenizer = transformers.NllbTokenizer(vocab=vocab, merges=[], extra_special_tokens=list(codes))
        ids = [tokenizer.convert_tokens_to_ids(code) for code in codes]
    else:
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([ENGLISH]), model_writer=model, model_type="char", vocab_size=40,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (folder / "spm.model").write_bytes(model.getvalue())
        (folder / "vocab.json").write_text(json.dumps(vocab))
        tokenizer = transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"))
        ids = [tokenizer.get_lang_id(code) for code in codes]
    torch.manual_seed(1)
    config = transformers.M2M100Config(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.8, vocab_size=max(ids) + 200,
    )  # fmt: skip
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    letters = {vocab[piece] for piece in pieces if re.fullmatch("[a-zA-Z]", piece)}
    model.generation_config.suppress_tokens = [n for n in range(config.vocab_size) if n not in {*letters, *ids}]
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, codes, ids


def test_a_model_of_many_languages_is_told_which(many_languages):
    folder, codes, ids = many_languages
    both = {"there": str(folder), "back": str(folder)}
    result = changed(step(**both, language=codes[0], foreign=codes[1], max_tokens=60), ENGLISH)
    expected = []
    for sentence, gap in sentences(ENGLISH):
        foreign = translate(folder, sentence, 60, codes[0], forced_bos_token_id=ids[1])
        again = translate(folder, foreign, 60, codes[1], forced_bos_token_id=ids[0]) if foreign else ""
        expected += [again or sentence, gap]
    assert result == "".join(expected)
    other_way = step(**both, language=codes[1], foreign=codes[0], max_tokens=60)
    assert changed(other_way, ENGLISH) != result, "the codes matter"
    for wrong, message in (
        ({}, "translates between many languages; give their codes"),
        ({"language": codes[0], "foreign": "tlh"}, "many languages, but not tlh"),
        ({"language": codes[0]}, "give language and foreign, or neither"),
    ):
        with pytest.raises(ConfigError, match=message):
            changed(step(**both, **wrong), ENGLISH)


def test_a_sentence_that_is_too_long_stays(models):
    one = step(there=str(models / "t5"), back=str(models / "marian"), max_tokens=60)
    long = "X1" * 80 + "."
    document = Document(f"Short one. {long}", "d")
    one.apply(document)
    assert document.text.endswith(f" {long}") and not document.text.startswith("Short one.")
    assert document.counts == {"augmented": 1, "sentences": 2, "sentences_left": 1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"there": None}, "back_translate.there: missing; give the folder of a model"),
        ({"back": "gone"}, "back_translate.back=gone: no config.json there"),
        ({"back": "{}/own"}, "no config.json there"),
        ({"back": "{}/pickled"}, "no model.safetensors there"),
    ],
)
def test_a_model_that_is_missing_is_named(models, change, message):
    (models / "pickled").mkdir(exist_ok=True)
    (models / "pickled" / "config.json").write_text("{}")
    (models / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    given = {"there": str(models / "t5"), "back": str(models / "t5")} | change
    with pytest.raises(ConfigError, match=message):
        step(**{name: value and value.format(models) for name, value in given.items()})


def test_a_model_of_another_kind_is_refused(models):
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=300)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(models / "gpt")
    one = step(there=str(models / "gpt"), back=str(models / "t5"))
    with pytest.raises(ConfigError, match="gpt is not a sequence-to-sequence model"):
        changed(one, ENGLISH)


def test_other_weights_are_another_recipe(models):
    settings = [
        step(there=str(models / name), back=str(models / "t5")).settings()["digests"] for name in ("t5", "marian")
    ]
    assert settings[0]["there"] != settings[1]["there"] and settings[0]["back"] == settings[1]["back"]
    (models / "t5" / "generation_config.json").write_text('{"forced_bos_token_id": 5}')
    again = step(there=str(models / "t5"), back=str(models / "t5")).settings()["digests"]
    assert again["there"] != settings[0]["there"], "what decides the text may be in any of the files"
