"""BOS, EOS, padding and the chat template survive import, export and generation. 0 is an id like any other."""

import json

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from megatrain.config import ExportConfig, GenerateConfig, ImportConfig, ModelConfig, TokenizerConfig
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.train_sentencepiece import train_sentencepiece
from megatrain.interop.hf_tokenizer import export_tokenizer
from megatrain.interop.huggingface import export_model
from megatrain.interop.load_model import load
from megatrain.model.init import build_model
from megatrain.verbs import generate as generate_verb
from megatrain.verbs.export import export_
from megatrain.verbs.import_ import import_

IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def foreign(folder, with_tokenizer=True, **ids):
    """Write a tiny Llama of random weights with these token ids, and a tokenizer that puts BOS before a text."""
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    config = LlamaConfig(**shape, max_position_embeddings=32, **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if with_tokenizer:
        vocabulary = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklm", "▁"])}
        made = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        made.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def there_and_back(tmp_path, folder):
    import_(ImportConfig(path=str(folder), out=str(tmp_path / "imported")))
    export_(ExportConfig(path=str(tmp_path / "imported"), out=str(tmp_path / "back")))
    return tmp_path / "back"


@pytest.mark.parametrize("with_tokenizer", [True, False])
@pytest.mark.parametrize("ids", [IDS, {"bos_token_id": None, "eos_token_id": [2, 3], "pad_token_id": None}])
def test_special_tokens_come_back_from_an_import_and_an_export(tmp_path, ids, with_tokenizer):
    back = there_and_back(tmp_path, foreign(tmp_path / "hf", with_tokenizer, **ids))
    for config in (AutoConfig.from_pretrained(back), GenerationConfig.from_pretrained(back)):
        assert {name: getattr(config, name) for name in ids} == ids
    if with_tokenizer:
        theirs = AutoTokenizer.from_pretrained(back)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 2, 1)
        assert theirs.chat_template == "{{ messages }}"
        assert theirs("abc").input_ids == AutoTokenizer.from_pretrained(tmp_path / "hf")("abc").input_ids
        assert theirs("abc").input_ids[0] == 0


def rendered(folder, **which):
    """Return a chat as the folder's tokenizer writes it."""
    chat = [{"role": "user", "content": "abc"}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False, **which)


@pytest.mark.parametrize("form", ["files", "list", "dict"])
def test_every_chat_template_comes_back_from_an_import_and_an_export(tmp_path, form):
    folder = foreign(tmp_path / "hf", **IDS)
    templates = {"default": "D {{ messages[0].content }}", "tool_use": "T {{ messages[0].content }}"}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    if form == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(templates["default"])
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
    elif form == "list":
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    else:
        config["chat_template"] = templates
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for place in (folder, there_and_back(tmp_path, folder)):
        assert rendered(place) == "D abc" and rendered(place, chat_template="tool_use") == "T abc"


def test_an_import_says_that_it_leaves_a_chat_template_out(tmp_path, capsys):
    folder = foreign(tmp_path / "hf", **IDS)
    there_and_back(tmp_path, folder)
    assert "chat template" not in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    import_(ImportConfig(path=str(folder), out=str(tmp_path / "without")))
    assert "without its chat template: that goes along only with a tokenizer.json" in capsys.readouterr().err


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 99, "eos_token_id": [2, 4]}


def test_sampling_defaults_come_back_from_an_import_and_an_export(tmp_path):
    folder = foreign(tmp_path / "hf", **IDS)
    GenerationConfig(**{**IDS, **SAMPLING}).save_pretrained(folder)
    back = there_and_back(tmp_path, folder)
    assert GenerationConfig.from_pretrained(back) == GenerationConfig.from_pretrained(folder)
    assert AutoConfig.from_pretrained(back).eos_token_id == [2, 4]


def test_a_generation_config_that_transformers_would_not_save_is_taken_over(tmp_path):
    folder = foreign(tmp_path / "hf", **IDS)
    path = folder / "generation_config.json"
    given = {**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6, "custom": {"a": [1]}}
    path.write_text(json.dumps(given))
    back = json.loads((there_and_back(tmp_path, folder) / "generation_config.json").read_text())
    given.pop("_from_model_config", None)
    assert back == given


BOS = ("<s>", 0)
POST_PROCESSORS = {
    "none": None,
    "bos": processors.TemplateProcessing("<s> $A", special_tokens=[BOS]),
    "bos and eos": processors.TemplateProcessing("<s> $A </s>", special_tokens=[BOS, ("</s>", 2)]),
    "eos": processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)]),
    "roberta": processors.RobertaProcessing(("</s>", 2), BOS),
    "bytes": processors.ByteLevel(trim_offsets=False),
    "bytes, then bos": processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing("<s> $A", special_tokens=[BOS])]
    ),
}


def with_post_processor(folder, post_processor, **settings):
    """Give the tokenizer of a folder another post-processor, and its tokenizer_config.json other settings."""
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = post_processor or processors.Sequence([])
    made.save(str(folder / "tokenizer.json"))
    if post_processor is None:
        whole = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**whole, "post_processor": None}))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_an_exported_tokenizer_begins_texts_as_its_dataset_did(tmp_path, kind, bos):
    """Whatever its own post-processor adds: transformers' ids are ours, and it stays the tokenizer of the dataset."""
    with_post_processor(foreign(tmp_path / "hf", **IDS), POST_PROCESSORS[kind])
    ours = find_tokenizer("hf", str(tmp_path / "hf"))
    ours.starts_with_bos = bos
    ours.save(tmp_path / "tokenizer")
    config = ModelConfig(num_layers=1, num_heads=2, hidden_size=16, vocab_size=40)
    weights = {name: p.detach() for name, p in build_model(config, seed=1).named_parameters()}
    for family in ("llama", "phi3"):  # transformers chooses the tokenizer's class by the model's, too
        out = tmp_path / family
        export_model(config, weights, out, tokenizer_dir=tmp_path / "tokenizer", end_of_document=2, family=family)
        theirs = AutoTokenizer.from_pretrained(out)
        for text in ("abc", "", "b a"):
            assert theirs(text).input_ids == [*ours.start(), *ours.encode(text)]
        for again in (load_tokenizer(out), load(out).need_tokenizer(), find_tokenizer("hf", str(out))):
            assert again.fingerprint == ours.fingerprint
        assert load_tokenizer(out).start() == ours.start()
    (tmp_path / "again").mkdir()
    export_tokenizer(
        tmp_path / "llama", (again := tmp_path / "again"), 32
    )  # a tokenizer that was copied from an export
    for name in {path.name for path in (tmp_path / "llama").glob("*tokenizer*")}:
        assert (again / name).read_bytes() == (tmp_path / "llama" / name).read_bytes()


@pytest.mark.parametrize("settings", [{"add_bos_token": True}, {"add_bos_token": False}, {}])
@pytest.mark.parametrize("kind", ["none", "bos", "bytes, then bos"])
def test_an_imported_tokenizer_begins_texts_as_transformers_does_and_so_does_its_export(tmp_path, kind, settings):
    """A tokenizer.json decides; `add_bos_token` beside it has no effect in transformers."""
    folder = foreign(tmp_path / "hf", **IDS)
    with_post_processor(folder, POST_PROCESSORS[kind], **settings)
    expected = AutoTokenizer.from_pretrained(folder)("abc").input_ids
    ours = load(folder).need_tokenizer()
    assert [*ours.start(), *ours.encode("abc")] == expected
    back = there_and_back(tmp_path, folder)
    assert AutoTokenizer.from_pretrained(back)("abc").input_ids == expected
    assert (back / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("bos", [True, False])
def test_the_two_files_of_gpt2_begin_texts_as_their_settings_say(tmp_path, bos):
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "add_bos_token": bos}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids
    ours = find_tokenizer("hf", str(tmp_path))
    assert [*ours.start(), *ours.encode("abc")] == expected and (expected[0] == 0) == bos


def prompts(path, prompt, monkeypatch):
    """Return the ids that `generate` gives to the model."""
    given = []
    monkeypatch.setattr(generate_verb, "sample", lambda model, ids, **options: given.append(ids) or iter([]))
    generate_verb.generate(GenerateConfig(path=str(path), prompt=prompt))
    return given[0]


def test_a_prompt_begins_with_bos_where_the_models_documents_do(tmp_path, monkeypatch):
    folder = foreign(tmp_path / "hf", **IDS)
    back = there_and_back(tmp_path, folder)
    for path in (folder, tmp_path / "imported", back):
        ids = prompts(path, "abc", monkeypatch)
        assert ids == AutoTokenizer.from_pretrained(folder)("abc").input_ids and ids[0] == 0
        assert prompts(path, "", monkeypatch) == [0]


@pytest.mark.parametrize("bos", [True, False])
def test_an_exported_sentencepiece_model_begins_texts_as_its_dataset_did(tmp_path, bos):
    ours = train_sentencepiece(iter(["some text to train on, ab\n" * 50]), TokenizerConfig(vocab_size=300), bos=True)
    ours.starts_with_bos = bos
    ours.save(tmp_path / "tokenizer")
    config = ModelConfig(num_layers=1, num_heads=2, hidden_size=16, vocab_size=ours.vocab_size)
    weights = {name: p.detach() for name, p in build_model(config, seed=1).named_parameters()}
    export_model(config, weights, tmp_path / "hf", tokenizer_dir=tmp_path / "tokenizer", end_of_document=1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("some </s> text").input_ids == [*ours.start(), *ours.encode("some </s> text")]
    assert theirs.bos_token_id == ours.beginning_of_document
    assert load_tokenizer(tmp_path / "hf").start() == ours.start()
    assert load(tmp_path / "hf").need_tokenizer().start() == ours.start()
