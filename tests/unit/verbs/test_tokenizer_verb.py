"""`megatrain tokenizer` trains on a sample that the seed and the data decide, and writes a folder that all can load."""

import errno
import json
import os
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from megatrain.cli import main
from megatrain.config.compose import compose
from megatrain.data import tokenizer_sample
from megatrain.data.card import Card
from megatrain.data.corpus import shard as shard_module
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer import META
from megatrain.data.tokenizer_card import CARD
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.tokenizer_sample import draw_sample
from megatrain.errors import ConfigError, DataError, EnvironmentFault
from megatrain.verbs import tokenizer as verb
from megatrain.verbs.tokenizer import tokenizer

SYLLABLES = ("mar", "ket", "bre", "ad", "fam", "hun", "riv", "gar", "den", "win", "dow", "let", "ter", "sum", "que")


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(5)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randrange(1, 4))) for _ in range(400)]
    for name, letter in (("web", "w"), ("code", "c")):
        (tmp_path / name).mkdir()
        lines = []
        for number in range(300):
            text = " ".join(f"{letter}{rng.choice(words)}" for _ in range(rng.randrange(5, 60)))
            lines.append(json.dumps({"text": f"{letter}{number} {text}.\n"}))
        (tmp_path / name / "a.jsonl").write_text("\n".join([*lines, *lines[:40]]) + "\n")
    return tmp_path


def composed(corpus, *words, out="t"):
    return compose("tokenizer", [f"out={corpus / out}", f"data.dir={corpus / 'data'}", "data.workers=1", *words])


def of_files(corpus, *words, out="t"):
    return composed(corpus, f"data.paths=[{corpus / 'web'}]", "tokenizer.vocab_size=600", *words, out=out)


def mixture(corpus, web, code, *words, out="t"):
    named = f"data.mixture={{{corpus / 'web'}: {web}, {corpus / 'code'}: {code}}}"
    return composed(corpus, "data=mixture", named, "tokenizer.vocab_size=500", *words, out=out)


def drawn(config):
    with Workers(1) as pool:
        return draw_sample(config, pool)


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "byte_level_bpe"])
def test_the_folder_is_loaded_by_us_and_by_transformers(corpus, kind):
    vocab = 400 if kind == "unigram" else 550
    words = [f"tokenizer={kind}", "tokenizer.fim_tokens=true", f"tokenizer.vocab_size={vocab}"]
    folder = tokenizer(of_files(corpus, *words))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    library = "hf" if kind == "byte_level_bpe" else "sentencepiece"
    assert find_tokenizer(library, str(folder)).fingerprint == ours.fingerprint
    text = "the wbread and 漢字 42\n    wriver <|fim_prefix|>"
    assert theirs(text, split_special_tokens=True).input_ids == ours.encode(text)
    assert len(theirs) == ours.vocab_size == vocab
    card = json.loads((folder / CARD).read_text())
    assert card["kind"] == kind and card["fingerprint"] == ours.fingerprint
    assert card["special_tokens"]["<|fim_middle|>"] == theirs.convert_tokens_to_ids("<|fim_middle|>")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "byte_level_bpe"])
def test_the_same_input_gives_the_same_bytes_on_any_number_of_workers(corpus, kind, monkeypatch):
    monkeypatch.setattr(shard_module, "SHARD_BYTES", 4096)
    words = [f"tokenizer={kind}", "tokenizer.train_bytes=20000", "tokenizer.vocab_size=380"]
    one = content(tokenizer(of_files(corpus, *words, out="one")))
    two = content(tokenizer(of_files(corpus, *words, "data.workers=2", out="two")))
    assert one == two
    other = content(tokenizer(of_files(corpus, *words, "seed=7", out="three")))
    assert other["tokenizer.json"] != one["tokenizer.json"]


def test_a_sample_is_bounded_random_and_without_duplicates(corpus):
    small, large = drawn(of_files(corpus, "tokenizer.train_bytes=5000")), drawn(of_files(corpus))
    everything = list(large)
    assert len(everything) == len(set(everything)) == 300
    assert 5000 <= sum(len(text) for text in small) < 5000 + 4096
    chosen = [everything.index(text) for text in list(small)[:-1]]
    assert chosen == sorted(chosen) and chosen != list(range(len(chosen))) and max(chosen) > 200
    assert set(list(small)[:-1]) != set(list(drawn(of_files(corpus, "tokenizer.train_bytes=5000", "seed=2"))))
    assert len(list(drawn(of_files(corpus, "clean.dedup=none")))) == 340


def test_the_sample_does_not_depend_on_when_memory_is_freed(corpus, monkeypatch):
    whole = drawn(of_files(corpus, "tokenizer.train_bytes=5000"))
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 3)
    assert drawn(of_files(corpus, "tokenizer.train_bytes=5000")).fingerprint() == whole.fingerprint()


def test_the_cleaning_recipe_is_applied(corpus):
    kept = drawn(of_files(corpus, "clean.steps=[{length: {min_characters: 300}}]"))
    assert 0 < len(list(kept)) < 300 and all(len(text) >= 300 for text in kept)


def test_only_so_much_of_a_source_is_read(corpus, monkeypatch):
    monkeypatch.setattr("megatrain.data.corpus.files_source.SHARD_BYTES", 4096)
    for name in ("b", "c", "d", "e"):
        (corpus / "web" / f"{name}.jsonl").write_text(json.dumps({"text": f"file {name} " + "x" * 5000}) + "\n")
    monkeypatch.setattr("megatrain.data.corpus.shard.SHARD_BYTES", 4096)
    whole = drawn(of_files(corpus)).sources["files"]
    part = drawn(of_files(corpus, "read_bytes=6000")).sources["files"]
    assert 0 < part.counts["read"] < whole.counts["read"]
    assert len({drawn(of_files(corpus, "read_bytes=6000", f"seed={seed}")).fingerprint() for seed in range(4)}) > 1


def test_weights_divide_the_bytes(corpus):
    sample = drawn(mixture(corpus, 0.75, 0.25, "tokenizer.train_bytes=20000"))
    assert {name: given.asked for name, given in sample.sources.items()} == {"web": 15000, "code": 5000}
    assert all(given.asked <= given.num_bytes < given.asked + 4096 for given in sample.sources.values())
    assert all(text.startswith("w") for text in sample.texts["web"])
    assert all(text.startswith("c") for text in sample.texts["code"])


def test_prepared_datasets_are_decoded_and_weighed_in_tokens(corpus, capsys):
    for name, vocab in (("web", 1200), ("code", 320)):
        words = [f"data.name={name}", f"data.dir={corpus / 'data'}", f"data.paths=[{corpus / name}]", "data.workers=1"]
        prepare(compose("prepare", ["data=files", *words, f"tokenizer.vocab_size={vocab}"]))
    words = ["data=mixture", "data.mixture={web: 0.5, code: 0.5}", "tokenizer.train_bytes=12000", "weights_in=tokens"]
    sample = drawn(composed(corpus, *words))
    rates = {}
    for name in ("web", "code"):
        split = Card.load(corpus / "data" / name).splits["train"]
        rates[name] = split.bytes / split.tokens
    assert rates["web"] > 1.3 * rates["code"]
    asked = {name: given.asked for name, given in sample.sources.items()}
    assert asked["web"] / asked["code"] == pytest.approx(rates["web"] / rates["code"], rel=1e-3)
    originals = {json.loads(line)["text"] for line in (corpus / "web" / "a.jsonl").read_text().splitlines()}
    assert set(sample.texts["web"][:-1]) <= originals
    assert sample.sources["web"].num_bytes >= asked["web"]
    epochs = ["data=mixture", "data.mixture={web: {epochs: 2}, code: {epochs: 1}}"]
    asked = {name: given.asked for name, given in drawn(composed(corpus, *epochs)).sources.items()}
    sizes = {name: Card.load(corpus / "data" / name).splits["train"].bytes for name in ("web", "code")}
    assert asked["web"] / asked["code"] == pytest.approx(2 * sizes["web"] / sizes["code"], rel=1e-3)
    assert "code has only" in capsys.readouterr().err


def test_a_dataset_made_for_fill_in_the_middle_is_refused_as_its_text_is_rearranged(corpus):
    for name, words in (("plain", []), ("fim", ["tokenizer.fim_tokens=true", "data.fim_rate=0.5"])):
        place = [f"data.name={name}", f"data.dir={corpus / 'data'}", f"data.paths=[{corpus / 'code'}]"]
        prepare(compose("prepare", ["data=files", *place, "tokenizer.vocab_size=600", "data.workers=1", *words]))
    assert drawn(composed(corpus, "data=mixture", "data.mixture={plain: 1}")).texts["plain"]
    with pytest.raises(ConfigError, match=r"data/fim: was prepared with data.fim_rate, .*; give the text"):
        drawn(composed(corpus, "data=mixture", "data.mixture={plain: 1, fim: 1}"))


def test_conversations_are_no_text_to_train_a_tokenizer_on(corpus):
    (corpus / "talks.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3"}\n' * 2)
    paths = f"data.paths=[{corpus / 'talks.jsonl'}]"
    with pytest.raises(ConfigError, match="data=chat: messages are laid out by a trained tokenizer"):
        tokenizer(composed(corpus, "data=chat", paths))
    with pytest.raises(ConfigError, match=r"data\.chat_template: has no effect"):
        tokenizer(composed(corpus, "data=files", paths, "data.chat_template=chatml"))
    assert not (corpus / "t").exists()
    place = [f"data.dir={corpus / 'data'}", "data.workers=1"]
    base = [*place, "data.name=base", f"data.paths=[{corpus / 'web'}]", "tokenizer.vocab_size=600"]
    prepare(compose("prepare", ["data=files", *base, "tokenizer.chat_template=chatml"]))
    words = [*place, "data.name=talks", paths, f"tokenizer.path={corpus / 'data' / 'base' / 'tokenizer'}"]
    prepare(compose("prepare", ["data=chat", *words, "data.heldout_fraction=0"]))
    with pytest.raises(ConfigError, match=r"data/talks: has conversations, .*; give text that has no markup"):
        drawn(composed(corpus, "data=mixture", "data.mixture={talks: 1}"))


def test_the_comparison_shows_how_it_was_trained(corpus, capsys):
    folder = tokenizer(mixture(corpus, 1, 1, "tokenizer.digits=single"))
    capsys.readouterr()
    assert main(["tokenizers", str(corpus / "web"), f"tokenizers=[{folder}]", "languages=false"]) == 0
    about = json.loads(capsys.readouterr().out)["tokenizers"][str(folder)]
    assert about["kind"] == "sentencepiece" and about["vocab_size"] == 500 and about["rules"]["digits"] == "single"
    assert set(about["trained_on_bytes"]) == {"web", "code"}


def test_sources_of_the_demonstration_corpus_are_in_a_folder_of_their_own(corpus):
    words = ["data=files", "data.name=web", f"data.dir={corpus}/data/demo", f"data.paths=[{corpus}/web]"]
    prepare(compose("prepare", [*words, "tokenizer.vocab_size=500", "data.workers=1"]))
    config = composed(corpus, "data=demo", "data.mixture={web: 1}", "tokenizer.vocab_size=400")
    assert list(drawn(config).sources) == ["web"]
    with pytest.raises(ConfigError, match=r"data.mixture.code: no dataset at .*megatrain prepare data=demo"):
        drawn(composed(corpus, "data=demo", "data.mixture={code: 1}"))


@pytest.mark.parametrize("source", ["python_stdlib", "demo", "mixture"])
def test_paths_that_a_source_does_not_read_are_refused(corpus, source, capsys):
    """Or the tokenizer would be trained on other text than the command names."""
    words = [f"data={source}", f"data.paths=[{corpus}/web]", "data.mixture={web: 1}"]
    assert main(["tokenizer", f"out={corpus / 't'}", *words[: 3 if source != "python_stdlib" else 2]]) == 2
    assert f"data.paths=[{corpus}/web]: data={source} does not read it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, error, message",
    [
        (["tokenizer.vocab_size=9000"], DataError, r"supports only \d+ tokens; give tokenizer.vocab_size=\d+ or less"),
        (["tokenizer=hf"], ConfigError, "tokenizer=byte_level_bpe"),
        (["tokenizer.path=x.model"], ConfigError, "tokenizer.path: names a tokenizer that is trained already"),
        (["clean.dedup=minhash"], ConfigError, "clean.dedup=minhash"),
        (["clean.dedup_passages=lines"], ConfigError, "clean.dedup_passages: has no effect"),
        (["data.write_text=true"], ConfigError, "data.write_text: has no effect"),
        (["data.deduplicate=false"], ConfigError, "data.deduplicate: has no effect"),
        (["data.packing=best_fit"], ConfigError, "data.packing: has no effect"),
        (["data.heldout_fraction=0.05"], ConfigError, "data.heldout_fraction: has no effect"),
        (["data.fim_spm_rate=1"], ConfigError, "data.fim_spm_rate: has no effect"),
        (["data.overwrite=true"], ConfigError, "data.overwrite: has no effect"),
        (["data=megatron"], ConfigError, "data=megatron: a tokenizer is trained on text"),
        (["data=mixture"], ConfigError, "data.mixture is empty"),
        (["data=mixture", "data.mixture={gone: 1}"], ConfigError, "data.mixture.gone: neither a prepared dataset"),
        (
            ["data=mixture", "data.mixture={web: {epochs: 1}}"],
            ConfigError,
            "epochs or a temperature needs the size",
        ),
        (
            ["data=mixture", "data.mixture={web: 1}", "weights_in=tokens"],
            ConfigError,
            "tokens needs the size",
        ),
        (
            ["data=mixture", "data.mixture={web: 1}", "data.phases=[{from_step: 9, mixture: {web: 1}}]"],
            ConfigError,
            "data.phases: a tokenizer is trained on one mixture",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(corpus, monkeypatch, words, error, message):
    monkeypatch.chdir(corpus)
    with pytest.raises(error, match=message):
        tokenizer(of_files(corpus, *words), words)
    assert sorted(path.name for path in corpus.iterdir()) == ["code", "web"]


def test_an_existing_folder_and_an_empty_corpus_are_refused(corpus):
    (corpus / "t").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        tokenizer(of_files(corpus))
    (corpus / "web" / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
        tokenizer(of_files(corpus, out="u"))
    (corpus / "web" / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"of 1 bytes supports only 2\d\d tokens; train on more text$"):
        tokenizer(of_files(corpus, out="u"))  # no vocabulary may be so small, so none is advised


def test_a_folder_that_cannot_be_made_is_refused_before_any_text_is_read(corpus, monkeypatch):
    monkeypatch.setattr(verb, "draw_sample", None)
    with pytest.raises(ConfigError, match=r"out: .*a.jsonl/t cannot be made, because .*a.jsonl is a file"):
        tokenizer(of_files(corpus, out="web/a.jsonl/t"))


def test_a_full_disk_is_no_mistake_in_the_command(corpus, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(verb, "export_tokenizer", full)
    with pytest.raises(EnvironmentFault, match=r"out: .* cannot be written \(No space left"):
        tokenizer(of_files(corpus))
    assert sorted(path.name for path in corpus.iterdir()) == ["code", "web"]


def test_the_folder_of_a_dataset_or_of_another_kind_is_told_from_a_tokenizer(corpus):
    folder = prepare(
        compose("prepare", ["data=files", f"data.dir={corpus}/data", "data.name=d", f"data.paths=[{corpus}/web]",
                            "data.workers=1", "tokenizer.vocab_size=400"])
    )  # fmt: skip
    for kind in ("sentencepiece", "hf"):
        with pytest.raises(
            ConfigError, match=r"data/d is the folder of a prepared dataset; its tokenizer is in .*/tok"
        ):
            find_tokenizer(kind, str(folder))
    made = tokenizer(of_files(corpus, "tokenizer=byte_level_bpe", "tokenizer.vocab_size=400"))
    assert find_tokenizer("sentencepiece", str(made)).kind == "hf", "a folder that megatrain wrote says its kind"
    (made / META).unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer.model of SentencePiece; .*give tokenizer=hf"):
        find_tokenizer("sentencepiece", str(made))


def test_prepare_trains_by_the_same_rules(corpus):
    words = [
        "data=files",
        f"data.dir={corpus / 'data'}",
        "data.name=d",
        f"data.paths=[{corpus / 'web'}]",
        "data.workers=1",
    ]
    chosen = ["tokenizer=byte_level_bpe", "tokenizer.vocab_size=500", "tokenizer.special_tokens=[<|call|>]"]
    folder = prepare(compose("prepare", [*words, *chosen]))
    made = load_tokenizer(folder / "tokenizer")
    assert made.kind == "hf" and made.vocab_size == 500 and made.control_token("<|call|>") == 1


def test_sampling_holds_no_more_than_twice_the_budget(corpus, monkeypatch):
    most = 0
    add = tokenizer_sample._Lowest.add

    def watched(self, result):
        nonlocal most
        add(self, result)
        most = max(most, self._size)

    monkeypatch.setattr(tokenizer_sample._Lowest, "add", watched)
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 3)
    drawn(of_files(corpus, "tokenizer.train_bytes=5000"))
    assert 5000 < most <= 10_000


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram", "byte_level_bpe"])
def test_threads_and_hash_seeds_change_no_byte(corpus, kind):
    """Separate processes, because the libraries read their number of threads once."""
    made = []
    for threads in ("1", "3"):
        out = corpus / threads
        words = [f"out={out}", f"data.paths=[{corpus / 'web'}]", f"tokenizer={kind}", "tokenizer.vocab_size=400"]
        environment = {
            **os.environ,
            "RAYON_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "PYTHONHASHSEED": threads,
        }
        command = [sys.executable, "-m", "megatrain", "tokenizer", *words, "data.workers=1"]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
        made.append(content(out))
    assert made[0] == made[1]


def test_bad_records_are_left_out_or_refused_as_in_prepare(corpus, capsys):
    with (corpus / "web" / "a.jsonl").open("a") as file:
        file.write("{bad\n" * 5)
    with pytest.raises(DataError, match="not a line of JSON"):
        drawn(of_files(corpus))
    assert len(list(drawn(of_files(corpus, "data.on_bad_record=skip")))) == 300
    assert "5 bad records are left out" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"^5 of 345 records are bad \(not json 5\), more than data.max_bad_fraction="):
        drawn(of_files(corpus, "data.on_bad_record=skip", "data.max_bad_fraction=0.01"))
