"""The held-out loss of a mixture: the weighted mean of its sources, and each source's own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megatrain.training.evaluation import Evaluation


def share(source, weight, bytes_per_token=4.0):
    return SimpleNamespace(source=source, weight=weight, bytes_per_token=bytes_per_token)


def test_one_dataset_has_one_loss():
    evaluation = Evaluation()
    evaluation.add(share("", 1.0), 33.3, 10)
    assert evaluation.metrics() == {"heldout_loss": 33.3 / 10}
    assert evaluation.detail()["bits_per_byte"] == pytest.approx(3.33 / math.log(2) / 4)


def test_without_a_label_there_is_no_loss_and_not_the_best_one():
    evaluation = Evaluation()
    evaluation.add(share("", 1.0), 0.0, 0)
    assert math.isnan(evaluation.loss) and math.isnan(evaluation.metrics()["heldout_loss"])


def test_a_source_without_a_label_is_left_out_of_the_mean():
    evaluation = Evaluation()
    evaluation.add(share("web", 7, 4.0), 300.0, 100)
    evaluation.add(share("chat", 3, 2.0), 0.0, 0)
    found = evaluation.metrics()
    assert found["heldout_loss"] == found["heldout_loss/web"] == 3.0 and math.isnan(found["heldout_loss/chat"])
    assert evaluation.detail()["bits_per_byte"] == pytest.approx(3 / math.log(2) / 4)


def test_a_mixture_is_weighed_by_its_shares_not_by_the_sizes_of_its_held_out_splits():
    evaluation = Evaluation()
    evaluation.add(share("web", 7, 4.0), 300.0, 100)
    evaluation.add(share("code", 3, 2.0), 20.0, 10)
    evaluation.add(share("later", 0, None), 50.0, 10)
    assert evaluation.metrics() == {
        "heldout_loss": pytest.approx((7 * 3 + 3 * 2) / 10),
        "heldout_loss/web": 3.0,
        "heldout_loss/code": 2.0,
        "heldout_loss/later": 5.0,
    }
    detail = evaluation.detail()
    assert detail["tokens"] == 120
    assert detail["bits_per_byte"] == pytest.approx(2.7 / math.log(2) / (0.7 * 4 + 0.3 * 2))


def test_bits_per_byte_need_the_size_of_every_text():
    evaluation = Evaluation()
    evaluation.add(share("web", 1, None), 3.0, 1)
    evaluation.add(share("code", 1, 2.0), 3.0, 1)
    assert "bits_per_byte" not in evaluation.detail()


def test_pairs_have_scalars_with_standard_errors_and_no_perplexity():
    """Of four pairs with the losses 1, 1, 3, 3, three of which are ordered rightly."""
    evaluation = Evaluation()
    scalars = {"accuracy": 0.75, "margin": 0.5, "loss_squared": 5.0, "tokens_a_term": 7.0}
    evaluation.add(share("", 1.0), 8.0, 4, scalars)
    assert evaluation.metrics() == {
        "heldout_loss": 2.0,
        "heldout_accuracy": 0.75,
        "heldout_margin": 0.5,
        "heldout_loss_se": 1.0 / 4**0.5,
        "heldout_accuracy_se": pytest.approx((0.75 * 0.25 / 4) ** 0.5),
    }
    detail = evaluation.detail()
    assert detail["pairs"] == 4 and not detail.keys() & {"perplexity", "bits_per_byte", "tokens"}
