"""`megatrain evaluate`: its loss equals the training loop's and transformers', and errors name a remedy."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatrain.config import EvaluateConfig, ExportConfig
from megatrain.data.card import Card, card_of_written, fingerprint
from megatrain.data.indexed import IndexedWriter
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.evaluate import compute_scores, evaluate
from megatrain.verbs.evaluation_sources import Source, TextTokens
from megatrain.verbs.export import export_
from megatrain.verbs.path_checks import check_paths

SEQ_LEN = 16


def result(capsys, path, **keys) -> dict:
    """Parse what the verb prints on standard output."""
    capsys.readouterr()
    assert not evaluate(EvaluateConfig(path=str(path), device="cpu", **keys))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_evaluate_gives_the_final_heldout_loss_of_training(finished, capsys):
    """With the run's dataset and windows, also in bits per byte and for any batch size."""
    trained = read_metrics(finished / "metrics.jsonl")[-1]["heldout_loss"]
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    logged = [event for event in events if event["kind"] == "evaluate"][-1]
    for batch_size in (4, 7):
        found = result(capsys, finished, batch_size=batch_size)
        assert found["loss"] == pytest.approx(trained, rel=1e-6)
        assert found["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)
        assert found["tokens"] == logged["tokens"] and found["seq_len"] == SEQ_LEN and found["step"] == 4
        assert found["perplexity"] == pytest.approx(math.exp(trained))


def test_a_terminal_shows_the_scores_without_json(finished, capsys, monkeypatch):
    """Elsewhere standard output has the JSON alone, and standard error the same lines."""
    evaluate(EvaluateConfig(path=str(finished), device="cpu", max_batches=1))
    piped = capsys.readouterr()
    assert set(json.loads(piped.out)) >= {"loss", "perplexity", "bits_per_byte"}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    evaluate(EvaluateConfig(path=str(finished), device="cpu", max_batches=1))
    shown = capsys.readouterr()
    assert "{" not in shown.out and "perplexity" not in shown.err

    def without_seconds(text):
        return [line for line in text.splitlines() if "seconds" not in line]

    assert without_seconds(shown.out) == without_seconds(piped.err) and len(shown.out.splitlines()) == 7


def test_without_a_terminal_progress_is_told_in_lines(finished, capsys, monkeypatch):
    monkeypatch.setattr("megatrain.verbs.evaluate.LINE_EVERY_S", 0.0)
    capsys.readouterr()
    evaluate(EvaluateConfig(path=str(finished), device="cpu", batch_size=2, max_batches=3))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluating: ")]
    assert told == [f"evaluating: {done}/3 batches ({share}%)" for done, share in ((0, 0), (1, 33), (2, 67))]


def test_a_model_trained_document_by_document_is_evaluated_document_by_document(
    train_job, dataset, tokenizer, tmp_path, capsys
):
    assert train_job(tmp_path, train__mask_documents=True) == 0
    run = tmp_path / "first"
    trained = read_metrics(run / "metrics.jsonl")[-1]["heldout_loss"]
    assert result(capsys, run)["loss"] == pytest.approx(trained, rel=1e-6)
    shutil.copytree(dataset, tmp_path / "foreign")
    card = Card.load(dataset)
    replace(card, tokenizer=None).save(tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"train.mask_documents=true, but .*foreign.* has no tokenizer"):
        result(capsys, run, data=str(tmp_path / "foreign"))


def test_documents_that_do_not_end_with_the_tokenizers_token_cannot_be_kept_apart(train_job, dataset, tmp_path):
    """The first document with tokens decides; an empty one before it does not."""
    folder = tmp_path / dataset.name
    shutil.copytree(dataset, folder)
    cards = {}
    for split, documents in (("train", [[], [5, 6, 7] * 40, [8] * 60]), ("heldout", [[5, 6, 7]])):
        writer = IndexedWriter(folder / split, np.dtype(np.uint16))
        for ids in documents:
            writer.add(np.array(ids, dtype=np.uint16), np.array([len(ids)], np.int32))
        writer.finish()
        cards[split] = card_of_written(writer, 100)
    replace(Card.load(dataset), splits=cards, fingerprint=fingerprint(cards)).save(folder)
    says = r"train.mask_documents=true: .* its first document ends with 7; name the tokenizer"
    with pytest.raises(ConfigError, match=says):
        train_job(tmp_path, train__mask_documents=True, data__dir=str(tmp_path))


def test_an_older_checkpoint_has_a_worse_loss(finished, capsys):
    earlier = result(capsys, finished / "checkpoints" / "step_00000002")
    assert earlier["step"] == 2
    assert earlier["loss"] > result(capsys, finished)["loss"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_of_a_text_is_that_of_transformers_in_float64(name, family, tokenizer, tmp_path, capsys):
    """In windows of `seq_len` each token of the text and its end is predicted once, after an end of document."""
    folder, _, _ = family(name)
    file = tmp_path / "text.txt"
    file.write_text("the naïve model sleeps; 東京 writes\n" * 9, encoding="utf-8")
    found = result(capsys, folder, data=str(file), seq_len=24, batch_size=3)
    export_(ExportConfig(path=str(folder), out=str(tmp_path / "hf")))
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").double()
    end = tokenizer.end_of_document
    ids = [end, *tokenizer.encode(file.read_text(encoding="utf-8")), end]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 24):
            window = torch.tensor(ids[start : start + 25])
            total += float(cross_entropy(oracle(window[None, :-1]).logits[0], window[1:], reduction="sum"))
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["bytes"] == file.stat().st_size
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / file.stat().st_size, rel=1e-5)


def test_max_batches_limits_the_batches_read(finished, capsys):
    found = result(capsys, finished, max_batches=2, batch_size=3)
    assert found["tokens"] == 6 * SEQ_LEN and found["bytes"] < result(capsys, finished)["bytes"]


def test_the_train_split_and_any_prepared_folder_can_be_named(finished, dataset, capsys):
    found = result(capsys, finished, data=str(dataset), split="train")
    assert found["tokens"] == Card.load(dataset).splits["train"].tokens - 1
    assert found["bytes"] == Card.load(dataset).splits["train"].bytes


def test_unknown_bytes_give_no_bits_per_byte(finished, dataset, tmp_path, capsys):
    foreign = shutil.copytree(dataset, tmp_path / "foreign")
    card = Card.load(foreign)
    card.splits["heldout"].bytes = None
    card.save(foreign)
    found = result(capsys, finished, data=str(foreign))
    assert found["bits_per_byte"] is None and found["bytes"] is None
    evaluate(EvaluateConfig(path=str(finished), data=str(foreign), device="cpu"))
    assert "unknown" in capsys.readouterr().err


def refusal(error, path, **keys) -> str:
    with pytest.raises(error) as caught:
        evaluate(EvaluateConfig(path=str(path), device="cpu", **keys))
    return str(caught.value)


def test_a_dataset_of_another_tokenizer_is_refused(finished, dataset, tmp_path):
    foreign = shutil.copytree(dataset, tmp_path / "foreign")
    card = Card.load(foreign)
    card.tokenizer.fingerprint = "0" * 32
    card.save(foreign)
    assert "another tokenizer" in refusal(ConfigError, finished, data=str(foreign))


def test_a_model_that_cannot_be_evaluated_is_refused_with_a_remedy(finished, family, tmp_path):
    binary, empty = tmp_path / "binary", tmp_path / "empty.txt"
    binary.write_bytes(b"abc\xff")
    empty.write_text("\x00")
    assert "byte 3" in refusal(DataError, finished, data=str(binary))
    assert "no text" in refusal(DataError, finished, data=str(empty))
    records = tmp_path / "records.jsonl.gz"
    records.write_bytes(b"")
    words = rf"holds records, whose braces .* tokenizer\.path={finished}/.*tokenizer"
    with pytest.raises(ConfigError, match=words):
        check_paths(EvaluateConfig(path=str(finished), data=str(records)))
    assert "give data=" in refusal(ConfigError, family("llama")[0])
    assert "seq_len=64 or less" in refusal(ConfigError, finished, seq_len=65)


def test_a_dataset_that_changed_since_training_is_refused(finished, dataset, tmp_path, train_job):
    runs = tmp_path / "runs"
    moved = shutil.copytree(dataset, tmp_path / "data" / "words")
    assert train_job(runs, data__dir=str(moved.parent), train__steps=1) == 0
    card = Card.load(moved)
    del card.splits["train"]
    card.fingerprint = fingerprint(card.splits)
    card.save(moved)
    assert "no longer the dataset" in refusal(DataError, runs / "first")
    shutil.rmtree(moved)
    assert "does not exist" in refusal(ConfigError, runs / "first")


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(finished, dataset, tmp_path, capsys, caplog):
    run = shutil.copytree(finished, tmp_path / "run")
    newest = run / "checkpoints" / "step_00000004" / "0.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert result(capsys, run)["step"] == 2
    assert str(newest) in caplog.text
    assert str(newest) in refusal(CheckpointError, newest.parent)
    other = run / "checkpoints" / "step_00000002" / "manifest.json"
    other.write_text("")
    assert "all 2 checkpoints" in refusal(CheckpointError, run)


def test_paths_that_hold_no_model_are_refused(finished, dataset, tmp_path):
    assert "prepared dataset" in refusal(ConfigError, dataset)
    assert "neither a run folder" in refusal(ConfigError, tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no checkpoint yet" in refusal(CheckpointError, tmp_path / "run")


def test_evaluating_a_run_does_not_disturb_a_save_in_progress(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    saving = run / "checkpoints" / "step_00000006.writing"
    saving.mkdir()
    assert result(capsys, run)["step"] == 4
    assert saving.exists()


def test_labels_of_which_none_counts_have_no_scores():
    with pytest.raises(DataError, match="no token of what was read counts in the loss; read more with max_batches"):
        compute_scores(0.0, 0, Source("talks (heldout)", TextTokens(Path("talks"), [1, 2]), None, 2, None))


def test_the_loss_of_an_ensemble_is_that_of_the_mean_probability_in_float64(family, tokenizer, tmp_path, capsys):
    """Of models of different sizes and families, by transformers; a model with itself predicts as it does alone."""
    folders = [family(name)[0] for name in ("llama", "gpt2")]
    file = tmp_path / "text.txt"
    file.write_text("the naïve model sleeps; 東京 writes\n" * 9, encoding="utf-8")
    keys = {"data": str(file), "seq_len": 24, "batch_size": 3}
    found = result(capsys, folders[0], ensemble=[str(folders[1])], **keys)
    oracles = []
    for number, folder in enumerate(folders):
        export_(ExportConfig(path=str(folder), out=str(tmp_path / f"hf{number}")))
        oracles.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"hf{number}").double())
    end = tokenizer.end_of_document
    ids = [end, *tokenizer.encode(file.read_text(encoding="utf-8")), end]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 24):
            window = torch.tensor(ids[start : start + 25])
            mean = sum(oracle(window[None, :-1]).logits[0].softmax(-1) for oracle in oracles) / 2
            total -= float(mean[torch.arange(len(window) - 1), window[1:]].log().sum())
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    assert found["ensemble"] == [str(folders[1])]
    alone, twice = (result(capsys, folders[0], ensemble=more, **keys) for more in ([], [str(folders[0])]))
    assert twice["loss"] == pytest.approx(alone["loss"], rel=1e-6) and "ensemble" not in alone


def test_an_ensemble_of_other_tokenizers_or_vocabularies_is_refused(family, finished, tmp_path):
    from megatrain.config import TokenizerConfig
    from megatrain.data.train_sentencepiece import train_sentencepiece

    other = shutil.copytree(family("llama")[0], tmp_path / "other")
    shutil.rmtree(other / "tokenizer")
    words = ["other words", "of another tokenizer", "entirely"] * 40
    train_sentencepiece(iter(words), TokenizerConfig(vocab_size=300)).save(other / "tokenizer")
    with pytest.raises(ConfigError, match=r"ensemble: .*other has another tokenizer than"):
        evaluate(EvaluateConfig(path=str(finished), ensemble=[str(other)], device="cpu"))
    with pytest.raises(ConfigError, match=r"ensemble=.*nowhere: no such file or folder"):
        check_paths(EvaluateConfig(path=str(finished), ensemble=[str(tmp_path / "nowhere")]))
