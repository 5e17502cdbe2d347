"""Scores of labelled examples: macro means are scikit-learn's, intervals SciPy's, and bad records are named by line."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score, precision_score, recall_score

from megatrain.errors import DataError
from megatrain.evaluation.intervals import bootstrap, wilson
from megatrain.evaluation.labelled import OTHER, _macro, classify, extract, read_examples


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (3, 7), (7, 7), (240, 1000)])
def test_wilsons_interval_is_scipys(hits, count):
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high))


def test_the_bootstraps_interval_of_a_mean_is_near_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap(lambda chosen: values[chosen].mean(), 400, seed=1)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_scores_of_labels_and_their_resamples_are_those_of_scikit_learn():
    chooser = np.random.default_rng(2)
    labels = list(chooser.choice(["no", "yes", "maybe"], 60))
    answers = [label if chooser.random() < 0.6 else chooser.choice(["no", "yes", "what"]) for label in labels]
    scores, detail = classify(labels, answers, seed=3)
    found = {one.metric: one.value for one in scores}
    kept = [answer if answer != "what" else OTHER for answer in answers]
    known = sorted(set(labels))
    for name, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = function(labels, kept, labels=known, average="macro", zero_division=0)
        assert found[f"{name}_macro"] == pytest.approx(expected)
    assert found["accuracy"] == np.mean(np.array(labels) == np.array(answers))
    number = {name: place for place, name in enumerate([*known, OTHER])}
    pairs = np.array([[number[a], number[b]] for a, b in zip(labels, kept, strict=True)])
    assert _macro(pairs, 3) == pytest.approx([found[f"{name}_macro"] for name in ("precision", "recall", "f1")])
    assert all(one.interval[0] < one.value < one.interval[1] for one in scores)
    assert detail["classes"] == [*known, OTHER] and np.sum(detail["confusion"]) == 60
    row = detail["confusion"][known.index("yes")]
    assert row == [sum(a == "yes" and b == name for a, b in zip(labels, kept, strict=True)) for name in [*known, OTHER]]


def test_texts_are_compared_by_their_words():
    """Case, punctuation and order do not count; a Chinese character is a word."""
    scores, _ = extract(["The Cat, sat.", "東京", "x"], ["the cat ran home", "京都", ""], seed=0)
    found = {one.metric: one.value for one in scores}
    assert found["exact_match"] == 0
    assert found["word_precision"] == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert found["word_recall"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    same, _ = extract(["The Cat, sat."], ["the cat sat"], seed=0)
    assert [one.value for one in same] == [1.0] * 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"prompt": "", "label": "a"}', 'line 2: prompt is ""'),
        ('{"prompt": "x", "label": null}', "line 2: label is null"),
    ],
)
def test_a_bad_record_is_named_by_its_line(line, says, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "x", "label": true}}\n{line}\n')
    with pytest.raises(DataError, match=says):
        read_examples(file)
    assert [one.label for one in read_examples(file, limit=1)] == ["true"]
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no examples"):
        read_examples(file)
