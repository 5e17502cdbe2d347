"""`megatrain evaluate examples=...`: the label that is chosen is the likeliest one by transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatrain.config import EvaluateConfig, ExportConfig
from megatrain.errors import ConfigError
from megatrain.verbs.evaluate import evaluate
from megatrain.verbs.export import export_

LABELS = ["reads", "東京 writes", "naïve"]


@pytest.fixture
def examples(tmp_path):
    rows = [{"prompt": f"the model {'and ' * number}is", "label": LABELS[number % 3]} for number in range(9)]
    (tmp_path / "kinds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "kinds.jsonl"


def evaluated(capsys, folder, examples, tmp_path, **keys):
    capsys.readouterr()
    out = tmp_path / "out.json"
    evaluate(EvaluateConfig(path=str(folder), examples=str(examples), device="cpu", out=str(out), **keys))
    shown = capsys.readouterr()
    result = json.loads(out.read_text())["tasks"]["kinds"]
    assert json.loads(shown.out)["tasks"]["kinds"]["scores"] == result["scores"]
    return result, shown.err


def test_the_label_that_is_chosen_is_the_likeliest_by_transformers(family, examples, tmp_path, capsys):
    folder = family("llama")[0]
    export_(ExportConfig(path=str(folder), out=str(tmp_path / "hf")))
    model, tokenizer = (one.from_pretrained(tmp_path / "hf") for one in (AutoModelForCausalLM, AutoTokenizer))
    result, told = evaluated(capsys, folder, examples, tmp_path, batch_size=4)
    for sample in result["samples"]:
        scores = []
        before = len(tokenizer(sample["prompt"])["input_ids"])
        for label in sorted(LABELS):
            ids = torch.tensor(tokenizer(f"{sample['prompt']} {label}")["input_ids"])
            with torch.no_grad():
                logs = model(ids[None]).logits[0].log_softmax(-1)
            scores.append(float(logs[torch.arange(before - 1, len(ids) - 1), ids[before:]].sum()))
        assert sample["answer"] == sorted(LABELS)[scores.index(max(scores))]
    assert len({sample["answer"] for sample in result["samples"]}) > 1
    assert "kinds by label" in told and "95% interval" in told


def test_written_answers_are_read_as_labels_or_by_their_words(family, examples, tmp_path, capsys):
    folder = family("llama")[0]
    written, told = evaluated(capsys, folder, examples, tmp_path, answer="written", max_new_tokens=5)
    assert all("\n" not in sample["answer"] for sample in written["samples"])
    assert "(none of these)" in told and written["scores"][0]["metric"] == "accuracy"
    text, _ = evaluated(capsys, folder, examples, tmp_path, answer="text", max_new_tokens=5)
    assert [sample["answer"] for sample in text["samples"]] == [sample["answer"] for sample in written["samples"]]
    assert {one["metric"] for one in text["scores"]} >= {"exact_match", "word_f1"}


def test_a_prompt_that_is_too_long_is_refused(family, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "reads " * 200, "label": "naïve"}))
    with pytest.raises(ConfigError, match=r"the model takes 64 \(model.max_seq_len\): 'reads reads"):
        evaluate(EvaluateConfig(path=str(family("llama")[0]), examples=str(tmp_path / "long.jsonl"), device="cpu"))
