"""What ranks tell each other each step: one encoding, and what all of them together mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatrain.training.exchange import RankExchange, RankReport

HASHES = np.array([1, 2**63 + 5, 2**64 - 1, 0], dtype=np.uint64)


def test_a_report_comes_back_as_it_was_sent():
    """Hashes above 2^63, which int64 does not have, included."""
    report = RankReport(15, True, False, 0.25, HASHES)
    row = report.encode()
    assert row.dtype == torch.int64 and row.tolist()[:4] == [15, 1, 0, 250_000_000]
    seen = []
    job = RankExchange(lambda row: row.unsqueeze(0), [0], lambda hashes: seen.append(hashes) or "hash")(report)
    assert (job.signal_number, job.save_failed, job.can_copy, job.own_times) == (15, True, False, [0.25])
    assert seen[0].dtype == np.uint64 and (seen[0] == HASHES).all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, False, True)),
        ({"signal_number": 10}, (10, False, True)),
        ({"save_failed": True}, (0, True, True)),
        ({"can_copy": False}, (0, False, False)),
    ],
)
def test_one_rank_decides_for_all(changes, expected):
    """A signal or a failed save on any rank counts; copies are made only where every rank can."""
    plain = {"signal_number": 0, "save_failed": False, "can_copy": True, "own_time_s": 1.0, "sample_hashes": HASHES}
    other = RankReport(**{**plain, **changes, "own_time_s": 2.0}).encode()
    exchange = RankExchange(lambda row: torch.stack([row, other]), [0], lambda hashes: "")
    job = exchange(RankReport(**plain))
    assert (job.signal_number, job.save_failed, job.can_copy) == expected and job.own_times == [1.0, 2.0]


def test_the_step_is_hashed_over_the_ranks_that_read_its_samples():
    """Tensor and context ranks read what others read too: their hashes are left out."""
    reports = [RankReport(0, False, False, 0.0, HASHES + np.uint64(rank)) for rank in range(4)]
    seen = []
    exchange = RankExchange(
        lambda row: torch.stack([one.encode() for one in reports]), [0, 2], lambda hashes: seen.append(hashes) or "hash"
    )
    assert exchange(reports[0]).batch_hash == "hash"
    assert (seen[0] == np.stack([HASHES, HASHES + np.uint64(2)])).all()
