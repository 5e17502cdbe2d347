"""A dataset of conversations has transformers' ids, counts the assistant's tokens alone, and cuts no talk."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers

from megatrain.config import CleanConfig, DataConfig, ModelConfig, PrepareConfig, TokenizerConfig
from megatrain.config.compose import compose
from megatrain.data.card import Card, check_dataset
from megatrain.data.chat.settings import KEYS_FOR_CHAT
from megatrain.data.indexed_dataset import IndexedDataset, verify_dataset
from megatrain.data.loader import heldout_batches, micro_batch_of, padded_ids
from megatrain.data.preparation import prepare
from megatrain.data.samples import open_samples
from megatrain.data.special_tokens import CHAT_TEMPLATES
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.engine.common import evaluate
from megatrain.errors import ConfigError, DataError
from megatrain.kernels import IGNORE_INDEX
from megatrain.model.init import build_model
from megatrain.training.datasets import HeldoutShare
from megatrain.verbs.evaluation_sources import open_dataset
from megatrain.verbs.path_checks import check_documents, check_paths

MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template whose turns end with the end-of-document token, as those of Llama 2 and Mistral do."""
T = 64


def talks(count=120):
    draw = random.Random(1)
    for number in range(count):
        turns = [
            {"role": role, "content": f"{draw.choice(['say', 'name', 'give'])} {number} " + "very " * draw.randrange(6)}
            for role in ["user", "assistant"] * draw.randrange(1, 4)
        ]
        yield {"id": f"t{number}", "messages": turns}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    (place / "marked.jinja").write_text(MARKED)
    texts = [message["content"] for talk in talks() for message in talk["messages"]]
    for name, template in (("marked", str(place / "marked.jinja")), ("chatml", "chatml"), ("none", None)):
        config = TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template=template)
        if name == "marked":
            config.special_tokens = ["<|user|>", "<|assistant|>"]
        train_byte_level_bpe(iter(texts), config).save(place / name)
    return place


@pytest.fixture
def make(tmp_path, tokenizers):
    """Return a function that prepares the conversations, or other records, and returns the folder."""

    def prepared(name="d", tokenizer="marked", records=None, clean=None, **data):
        lines = "".join(json.dumps(one) + "\n" for one in records or talks())
        if not (path := tmp_path / "talks.jsonl").exists() or path.read_text() != lines:
            path.write_text(lines)
        base = dict(name=name, dir=str(tmp_path / "out"), kind="chat", paths=[str(path)], workers=1)
        words = TokenizerConfig(kind="hf", path=str(tokenizers / tokenizer) if tokenizer else None)
        config = PrepareConfig(seed=1, data=DataConfig(**base | data), clean=clean or CleanConfig(), tokenizer=words)
        return prepare(config)

    return prepared


@pytest.mark.parametrize("workers", [1, 2])
def test_ids_and_counted_tokens_are_those_of_transformers(make, tokenizers, workers):
    folder = make(heldout_fraction=0, workers=workers)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizers / "marked")
    dataset = IndexedDataset.open(folder, "train")
    start = 0
    for talk, ids in zip(talks(), dataset.documents(), strict=True):
        expected = theirs.apply_chat_template(talk["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == expected["input_ids"], "they end with the end-of-document token, so none is added"
        assert dataset.counts(start, len(ids)).astype(int).tolist() == expected["assistant_masks"]
        start += len(ids)


def test_the_loss_is_that_of_transformers_on_each_conversation_alone(make, tokenizers):
    """Of a model whose positions begin anew in each conversation: packing changes nothing, held-out data included."""
    folder = make(heldout_fraction=0.3)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizers / "marked")
    config = ModelConfig(
        num_layers=2, num_heads=2, num_kv_heads=2, hidden_size=32, ffn_size=64, vocab_size=len(theirs), max_seq_len=T
    )
    model = build_model(config, seed=3)
    end = Card.load(folder).tokenizer.end_of_document
    documents = IndexedDataset.open(folder, "heldout")
    options = dict(micro_batch_size=4, dp_rank=0, dp_size=1, end_of_document=end, reset_positions=True)
    batches = list(heldout_batches(documents, seq_len=T, **options))
    loss, tokens = evaluate(model, batches, torch.device("cpu"))
    total = count = 0
    by_ids = {}
    for talk in talks():
        found = theirs.apply_chat_template(talk["messages"], return_dict=True, return_assistant_tokens_mask=True)
        by_ids[tuple(found["input_ids"])] = found["assistant_masks"]
    for ids in documents.documents():
        labels = torch.tensor([i if m else -100 for i, m in zip(ids, by_ids[tuple(ids.tolist())], strict=True)][1:])
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None])[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    assert int(tokens) == count > 100
    assert float(loss) == pytest.approx(total, rel=1e-6)
    assert all(len(row) > 1 for batch in batches[:-1] for row in batch.documents.lengths), "packed, several in a row"


def test_what_the_template_ends_with_another_token_gets_the_end_of_a_document(make):
    folder = make(tokenizer="chatml", heldout_fraction=0)
    dataset, end = IndexedDataset.open(folder, "train"), Card.load(folder).tokenizer.end_of_document
    start = 0
    for ids in dataset.documents():
        assert ids[-1] == end and not dataset.counts(start, len(ids))[-1]
        start += len(ids)


def test_labels_that_do_not_count_are_ignored_in_training_too(make):
    folder = make(heldout_fraction=0)
    dataset, end = IndexedDataset.open(folder, "train"), Card.load(folder).tokenizer.end_of_document
    samples = open_samples(dataset, "best_fit", T, True)
    counted = 0
    for window in range(samples.num_samples):
        sample = samples.read(window, None)
        batch = micro_batch_of([sample], padded_ids([sample], T), end, True)
        labels = batch.labels[0].tolist()
        kept = [i for i, counts in zip(sample.ids[1:].tolist(), sample.counts[1:], strict=True) if counts]
        assert [label for label in labels if label != IGNORE_INDEX] == kept
        counted += len(kept)
    assert counted == int(dataset.counts(0, dataset.num_tokens).sum())


def test_a_changed_mask_is_another_dataset_and_a_damaged_one_is_noticed(make):
    folder = make()
    card = Card.load(folder)
    other = make("other", tokenizer="chatml")
    assert card.fingerprint != Card.load(other).fingerprint
    path = folder / "train.loss"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.loss: bytes 0 to .* are not what was prepared"):
        IndexedDataset.open(folder, "train").counts(0, 10)
    with pytest.raises(DataError, match=r"train\.loss: block at byte 0 does not match"):
        verify_dataset(folder)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"train\.loss: \d+ bytes, but the card says"):
        check_dataset(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"train\.loss: no such file"):
        check_dataset(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer": None}, "give the tokenizer of the model that is to be tuned"),
        ({"tokenizer": "none"}, "the tokenizer has no chat template; give one whose markers are control tokens"),
        ({"tokenizer": "none", "chat_template": "chatml"}, r"writes <\|im_start\|>, <\|im_end\|>, which the tokenizer"),
        ({"chat_template": "nowhere.jinja"}, "data.chat_template=nowhere.jinja: no such file"),
        ({"bos": True}, "data.bos=true: the chat template says"),
        ({"fim_rate": 0.5}, "data.fim_rate=0.5: the documents of data=chat are messages"),
        ({"write_text": True}, "data.write_text=true: the documents of data=chat"),
        ({"clean": CleanConfig(dedup="minhash")}, "clean.dedup=minhash: the documents"),
        ({"clean": CleanConfig(dedup_passages="lines")}, "clean.dedup_passages=lines: the documents"),
        ({"clean": CleanConfig(name="c4", steps=["unicode"])}, "clean=c4: the documents"),
        (
            {"kind": "files", "chat_template": "chatml"},
            "only data=chat and data=pairs and data=prompts lay out messages",
        ),
    ],
)
def test_settings_that_conversations_cannot_honour_are_refused(make, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)
    assert not (tmp_path / "out" / "d").exists()


@pytest.mark.parametrize(
    "template, message",
    [
        ("{# messages #}", "the template writes nothing of a reply, so no token would count"),
        ("{{ messages[0].content * (1 // 0) }}", "cannot be filled in .ZeroDivisionError"),
    ],
)
def test_a_template_is_tried_before_anything_is_read(make, tmp_path, template, message):
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(ConfigError, match=message):
        make(chat_template=str(tmp_path / "own.jinja"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, reason, said",
    [
        ("chat", "refused_by_template", "the chat template refuses the messages: no oddities"),
        ("chat", "dropped_by_template", r"the chat template leaves out message 1 \(system\)"),
        ("chat", "nothing_in_loss", "marks nothing of the reply"),
        ("pairs", "refused_by_template", "no oddities"),
        ("pairs", "dropped_by_template", r"message 1 \(system\)"),
        ("prompts", "refused_by_template", "no oddities"),
        ("prompts", "dropped_by_template", r"message 1 \(system\)"),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_a_bad_record(make, tmp_path, kind, reason, said):
    """Named by its line; or skipped, and counted by the reason. A system message that says what the user says too."""
    refuses = "{% if 'odd' in messages[0].content %}{{ raise_exception('no oddities') }}{% endif %}"
    deaf = "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    only = MARKED.replace("== 'assistant'", "== 'assistant' and m['content'] != 'silence'")
    (tmp_path / "own.jinja").write_text(refuses + deaf + only)
    asked = {"refused_by_template": {"instruction": "an odd question"}, "nothing_in_loss": {"instruction": "x"}}
    system = {"dropped_by_template": [{"role": "system", "content": "name it"}, {"role": "user", "content": "name it"}]}
    prompt = asked.get(reason) or {"prompt": system[reason]}
    replies = {
        "chat": {"output": "silence" if reason == "nothing_in_loss" else "yes"},
        "pairs": {"chosen": "yes", "rejected": "no"},
        "prompts": {"answer": "yes"},
    }
    if kind == "chat" and "prompt" in prompt:
        bad = {"messages": [*prompt["prompt"], {"role": "assistant", "content": "yes"}]}
    else:
        bad = {**prompt, **replies[kind]}
    good = [
        {"instruction": f"name {n}", **replies[kind], **({"output": "yes"} if kind == "chat" else {})} for n in "abc"
    ]
    given = dict(records=[*good, bad], chat_template=str(tmp_path / "own.jinja"), kind=kind)
    with pytest.raises(
        DataError, match=rf"talks\.jsonl:4: .*{said}.*; change the record or data\.chat_template, or set"
    ):
        make(**given)
    card = Card.load(make(**given, on_bad_record="skip"))
    assert card.counts[f"bad_{reason}"] == card.counts["bad"] == 1
    assert sum(split.documents for split in card.splits.values()) == 3


def test_a_template_that_strips_contents_leaves_nothing_out(make, tmp_path):
    (tmp_path / "own.jinja").write_text(MARKED.replace("m['content']", "m['content'].strip()"))
    card = Card.load(make(chat_template=str(tmp_path / "own.jinja"), workers=2))
    assert not card.counts.get("bad") and sum(split.documents for split in card.splits.values()) == 120


def test_there_are_no_bits_per_byte_of_replies_in_text_of_whole_conversations(make):
    folder = make()
    share = SimpleNamespace(dataset=IndexedDataset.open(folder, "heldout"))
    assert share.dataset.split_card.bytes and vars(HeldoutShare)["bytes_per_token"].fget(share) is None
    assert open_dataset(folder, "heldout", SimpleNamespace(tokenizer=None)).num_bytes is None


def test_bad_conversations_stop_or_are_skipped_and_counted_by_their_line(make):
    good = list(talks(20))
    bad = [{"messages": good[0]["messages"][:1]}, {"messages": []}, {"text": "x"}]
    with pytest.raises(DataError, match=r"talks\.jsonl:21: it does not end with the assistant's reply"):
        make(records=[*good, *bad])
    card = Card.load(make(records=[*good, *bad], on_bad_record="quarantine"))
    kinds = {name: count for name, count in card.counts.items() if name.startswith("bad_") and count}
    assert sum(kinds.values()) == 3 and card.splits["train"].documents + card.splits["heldout"].documents == 20
    with pytest.raises(DataError, match=r"there is one conversation, .* set data\.heldout_fraction=0"):
        make("one", records=good[:1])


def test_folds_are_disjoint_equal_and_all_there_is_and_equal_talks_are_in_one(make):
    """Whatever the order of the records; a conversation that comes again is in one fold, not in two."""
    records = [*talks(20), *talks(3)]
    found = []
    for fold in (1, 2, 3):
        given = records if fold < 3 else records[::-1]
        folder = make(f"f{fold}", records=given, folds=3, fold=fold, clean=CleanConfig(dedup="none"))
        found.append([tuple(ids.tolist()) for ids in IndexedDataset.open(folder, "heldout").documents()])
        trained = {tuple(ids.tolist()) for ids in IndexedDataset.open(folder, "train").documents()}
        assert not trained & set(found[-1]) and len(trained | set(found[-1])) == 20
    assert sorted(len(set(one)) for one in found) == [6, 7, 7] and len(set().union(*found)) == 20
    assert sum(map(len, found)) == 23
    with pytest.raises(DataError, match=r"data.folds=30: there are 20 different documents; give fewer folds"):
        make("many", folds=30, fold=1, records=records)


def test_a_run_must_pack_them_and_keep_them_apart(make):
    folder = make()
    card = Card.load(folder)
    config = compose("train", [f"data.name={folder.name}", f"data.dir={folder.parent}"])
    with pytest.raises(ConfigError, match=r"has conversations, .* add data\.packing=best_fit train\.mask"):
        check_documents(config.data, True, card, folder)
    config.data.packing = "best_fit"
    check_documents(config.data, True, card, folder)
    with pytest.raises(ConfigError, match="must stay whole and apart"):
        check_documents(config.data, False, card, folder)


def test_a_run_on_a_mixture_must_keep_them_whole_and_apart_too(make):
    folders = [make(), make("other", records=list(talks(40)))]
    weights = ", ".join(f"{folder}: 0.5" for folder in folders)
    keys = [
        "data=mixture",
        f"data.mixture={{{weights}}}",
        f"run.dir={folders[0].parent}",
        "model=tiny",
        f"train.seq_len={T}",
        "launch.nproc_per_node=1",
        "tracking=none",
    ]
    with pytest.raises(ConfigError, match=r"has conversations, .* add data\.packing=best_fit train\.mask"):
        check_paths(compose("train", keys))
    check_paths(compose("train", [*keys, *KEYS_FOR_CHAT]))


def test_an_edited_template_is_another_preparation(make, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(MARKED)
    make(chat_template=str(template))
    make(chat_template=str(template))
    template.write_text(MARKED.replace("eos_token", "'.' + eos_token"))
    with pytest.raises(ConfigError, match=r"prepared with other settings: the chat template"):
        make(chat_template=str(template))


def test_the_same_template_or_tokenizer_at_another_place_is_the_same_preparation(make, tmp_path, tokenizers, capsys):
    for name in ("one.jinja", "two.jinja"):
        (tmp_path / name).write_text(MARKED)
        make(chat_template=str(tmp_path / name))
    shutil.copytree(tokenizers / "marked", tmp_path / "moved")
    make(chat_template=str(tmp_path / "one.jinja"), tokenizer=str(tmp_path / "moved"))
    assert capsys.readouterr().err.count("already prepared with these settings") == 2
    with pytest.raises(ConfigError, match=r"other settings: the tokenizer at tokenizer.path; the chat template\."):
        make(tokenizer="chatml")


def test_a_trained_tokenizers_template_counts_by_what_it_says(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(message["content"] for talk in talks() for message in talk["messages"]))
    data = DataConfig(name="d", dir=str(tmp_path / "out"), kind="files", paths=[str(tmp_path / "a.txt")], workers=1)

    def prepared(name):
        words = TokenizerConfig(kind="byte_level_bpe", vocab_size=300, chat_template=name and str(tmp_path / name))
        prepare(PrepareConfig(seed=1, data=data, tokenizer=words))

    for name in ("one.jinja", "two.jinja", "three.jinja"):
        (tmp_path / name).write_text(CHAT_TEMPLATES["chatml"] + "!" * (name == "three.jinja"))
    prepared("one.jinja")
    prepared("two.jinja")
    assert "already prepared with these settings" in capsys.readouterr().err
    for other in ("three.jinja", None):
        with pytest.raises(ConfigError, match=r"other settings: the chat template \(tokenizer.chat_template\)"):
            prepared(other)


def test_a_template_that_asks_for_the_date_is_told_the_same_one_on_any_day(make, tmp_path, capsys):
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%Y') }}" + MARKED)
    folder = make(chat_template=str(tmp_path / "dated.jinja"), heldout_fraction=0)
    assert "asks for the date (strftime_now) and is told 26 July 2024" in capsys.readouterr().err
    ids = next(IndexedDataset.open(folder, "train").documents())
    assert load_tokenizer(folder / "tokenizer").decode(ids.tolist()).startswith("2024")


def test_the_dataset_keeps_the_template_with_its_tokenizer(make, tokenizers, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(MARKED.replace("eos_token", "'!' + eos_token"))
    folder = make(chat_template=str(template), heldout_fraction=0)
    kept = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert kept.chat_template == template.read_text()
    ids = next(iter(IndexedDataset.open(folder, "train").documents()))
    assert ids.tolist() == kept.apply_chat_template(next(talks())["messages"], return_dict=True)["input_ids"]
