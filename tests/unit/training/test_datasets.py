"""The held-out share of a rank: how much of its split an evaluation reads."""

from __future__ import annotations

import numpy as np
import pytest

from megatrain.config import TrainConfig
from megatrain.training import datasets
from megatrain.training.datasets import HeldoutShare


class Split:
    """A split of 1,000 windows of 16 tokens."""

    name, num_tokens = "split", 16_001

    def read(self, start, count):
        return np.zeros(min(count, self.num_tokens - start), np.int64)

    def counts(self, start, count):
        return None

    def pause(self):
        pass


@pytest.mark.parametrize(("eval_steps", "read"), [(None, 63), (5, 5), (63, 63), (100, 63)])
def test_an_evaluation_counts_its_batches_in_global_batches_on_any_number_of_ranks(eval_steps, read):
    config = TrainConfig()
    config.model.vocab_size = 10
    loop = config.train
    loop.seq_len, loop.global_batch_size, loop.micro_batch_size, loop.eval_steps = 16, 16, 2, eval_steps
    for dp_size in (1, 4):
        share = HeldoutShare("", 1.0, Split(), config, dp_size - 1, dp_size, None)
        assert (share.num_batches, share.all_batches) == (read, 63)
        micro_batches = len(list(share.batches()))
        done = [share.batches_done(number) for number in range(micro_batches + 1)]
        assert done == sorted(done) and done[0] == 0 and read - 1 <= done[-1] <= read


def test_how_far_an_evaluation_is_costs_no_file_to_open(monkeypatch):
    """Conversations are packed: counting them reads a file, which is done once and not for every micro-batch."""
    opened = []
    monkeypatch.setattr(datasets, "count_windows", lambda *given: opened.append(given) or 1000)
    share = HeldoutShare("", 1.0, Split(), TrainConfig(), 0, 1, None)
    assert [share.batches_done(number) for number in range(0, 64, 8)] and len(opened) == 1
