"""The losses over pairs against their formulas in float64, and the sums over replies."""

from __future__ import annotations

import pytest
import torch

from megatrain.data.batch import MicroBatch, Pairs
from megatrain.errors import ConfigError
from megatrain.optim.preferences import DirectPreference, PairReward, ReferenceTable, preference_loss, reply_sums

REPLIES = torch.tensor([[0, 0, 4, 1, 1, 2], [3, 3, 3, 4, 4, 4]])
ENDS = torch.tensor([[4, 0, 4, 4, 1, 2], [4, 4, 3, 4, 4, 4]])
VALUES = torch.tensor([[-1.0, -2, -9, -3, -4, -5], [-6, -7, -8, -9, -9, -9]])
PAIRS = Pairs(REPLIES, ENDS, torch.tensor([5, 2]), torch.tensor([2, 2, 1, 3]), counted=2)
BATCH = MicroBatch(REPLIES, REPLIES, pairs=PAIRS)


class Head:
    """Gives the values above as log-probabilities and as scores, to the second of two context ranks' equal slices."""

    context_size = 2

    def token_log_probs(self, hidden, labels):
        return hidden

    def token_scores(self, hidden):
        return hidden

    def sum_over_context(self, values):
        return values


def test_values_are_summed_by_reply():
    assert reply_sums(VALUES, REPLIES, 2).tolist() == [[-3, -7], [-5, -21]]
    assert reply_sums(VALUES[:0], REPLIES[:0], 0).shape == (0, 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_difference_is_that_of_the_formula(smoothing):
    difference = torch.linspace(-30, 30, 7, requires_grad=True)
    exact = difference.detach().double().requires_grad_()
    true = (1 - smoothing) * torch.log1p(torch.exp(-exact)) + smoothing * torch.log1p(torch.exp(exact))
    loss = preference_loss(difference, smoothing)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-5)
    (gradient,), (true_gradient,) = (torch.autograd.grad(x.sum(), y) for x, y in ((loss, difference), (true, exact)))
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-6)


def test_direct_preference_compares_with_the_reference_of_each_pair():
    table = torch.zeros(6, 2)
    table[5], table[2] = torch.tensor([-4.0, -6.0]), torch.tensor([-5.0, -20.0])
    objective = DirectPreference(0.5, 0.1, 2.0, ReferenceTable(table))
    hidden = VALUES.clone().requires_grad_()
    loss, scalars = objective(Head(), hidden, BATCH)
    d = torch.tensor([0.5 * ((-3 + 4) - (-7 + 6)), 0.5 * ((-5 + 5) - (-21 + 20))]).double()
    true = -0.9 * torch.sigmoid(d).log() - 0.1 * torch.sigmoid(-d).log() + 2 * torch.tensor([3 / 2, 5.0])
    assert float(loss.detach()) == pytest.approx(float(true.sum()) / 2, rel=1e-6), "a share of two"
    found = dict(zip(objective.scalar_names, (2 * float(value) for value in scalars), strict=True))
    assert found["accuracy"] == 2 and found["margin"] == pytest.approx(float(d.sum()))
    assert found["chosen_log_prob"] == -8 and found["tokens_a_term"] == 8
    assert found["loss_squared"] == pytest.approx(float((true**2).sum()), rel=1e-6)
    assert objective.count(BATCH) == 2


def test_what_is_recorded_is_what_the_pairs_get():
    objective = DirectPreference(0.5)
    with objective.reference.recording(6, torch.device("cpu")) as recorded:
        loss, _ = objective(Head(), VALUES, BATCH)
    assert loss == 0 and recorded[5].tolist() == [-3, -7, 1] and recorded[2].tolist() == [-5, -21, 1]
    assert recorded.sum() == -34
    with pytest.raises(ConfigError, match="reference are missing"):
        objective(Head(), VALUES, BATCH)


def test_a_reward_is_the_score_of_the_last_token():
    loss, scalars = PairReward(margin=0.5, centering=0.1)(Head(), VALUES, BATCH)
    chosen, rejected = torch.tensor([-2.0, -5.0]).double(), torch.tensor([-4.0, -8.0]).double()
    true = -torch.sigmoid(chosen - rejected - 0.5).log() + 0.1 * (chosen + rejected) ** 2
    assert float(loss) == pytest.approx(float(true.sum()) / 2, rel=1e-6)
    assert [2 * float(value) for value in scalars[:4]] == [2, 5, -7, -12]


def test_a_batch_without_pairs_is_refused():
    with pytest.raises(ConfigError, match="prepare one with data=pairs"):
        PairReward().count(MicroBatch(REPLIES, REPLIES))
