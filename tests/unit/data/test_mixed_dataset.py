"""Opening the datasets of a mixture: cards alone, checked against one another; and reading them as one."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megatrain.config.compose import compose
from megatrain.data import mixed_dataset
from megatrain.data.card import Card, TokenizerCard
from megatrain.data.loader import TrainStream, in_sample_order, step_hash
from megatrain.data.mixed_dataset import MixedSamples, open_mixture
from megatrain.data.mixture import MixtureOrder
from megatrain.data.verified_file import VerifiedFile
from megatrain.errors import ConfigError, DataError
from megatrain.optim.schedule import samples_before

T = 8
TOKENIZER = TokenizerCard("hf", "f" * 32, 5000, 0)
PHASES = "data.phases=[{from_step: 6, mixture: {web: 1, zh: 1}}]"


def with_tokenizer(folder, tokenizer):
    card = Card.load(folder)
    card.tokenizer = tokenizer
    card.save(folder)


@pytest.fixture
def sets(make_dataset, tmp_path):
    """Three datasets whose ids tell where they come from: web below 1,000, code from 2,000, zh from 3,000 on."""
    for name, first, count in (("web", 0, 1000), ("code", 2000, 203), ("zh", 3000, 81)):
        folder = make_dataset(name, train=first + np.arange(count), heldout=first + np.arange(30))
        with_tokenizer(folder, TOKENIZER)
    return tmp_path


def config(sets, mixture="{web: 0.7, code: 0.2, zh: 0.1}", *words):
    return compose(
        "train", ["data=mixture", f"data.mixture={mixture}", f"data.dir={sets}", f"train.seq_len={T}", *words]
    )


def opened(sets, *words):
    given = config(sets, *words)
    mixture = open_mixture(given, samples_before)
    return mixture, MixedSamples(mixture, T, "concatenate", True), MixtureOrder(mixture.plan, "train", T, 7)


def read(dataset, order, k):
    (window,) = order.windows(np.array([k]))
    return dataset.read(int(window), None).ids


def test_samples_are_whole_windows_of_their_sources(sets):
    _, dataset, order = opened(sets)
    firsts = {"web": 0, "code": 2000, "zh": 3000}
    seen = dict.fromkeys(firsts, 0)
    sizes = {"web": 124, "code": 25, "zh": 10}
    windows = {name: set() for name in firsts}
    for k in range(200):
        ids = read(dataset, order, k)
        assert (np.diff(ids) == 1).all() and len(ids) == T + 1
        name = next(n for n in ("zh", "code", "web") if ids[0] >= firsts[n])
        assert (ids[0] - firsts[name]) % T == 0 and ids[-1] < firsts[name] + sizes[name] * T + 1
        windows[name].add(int(ids[0]))
        seen[name] += 1
    assert seen == {"web": 140, "code": 40, "zh": 20}
    assert {name: len(found) for name, found in windows.items()} == sizes  # each was read whole, then again


def test_every_window_of_every_source_can_be_read(sets):
    _, dataset, _ = opened(sets)
    for window in range(dataset.num_samples):
        assert (np.diff(dataset.read(window, None).ids) == 1).all()
    for window, found in (
        (0, "code/train.bin: token id 2000 at byte 0 "),
        (25, "web/train.bin: token id 5 at byte 10 "),
    ):
        with pytest.raises(DataError, match=re.escape(found)):
            dataset.read(window, 5)


def hashes(sets, dp_size, micro_batch_size, steps, first_step=1, cursor=0, skip_ranges=()):
    """The batch hashes of a run on `dp_size` data-parallel ranks."""
    by_rank = []
    for rank in range(dp_size):
        _, dataset, order = opened(sets, "{web: 0.7, code: 0.2, zh: 0.1}", PHASES)
        stream = TrainStream(
            dataset, order, vocab_size=5000, micro_batch_size=micro_batch_size, dp_rank=rank,
            dp_size=dp_size, batch_size=lambda step: 8, first_step=first_step, cursor=cursor, skip_ranges=skip_ranges,
        )  # fmt: skip
        by_rank.append([next(stream) for _ in range(steps)])
        stream.close()
    return [
        step_hash(in_sample_order(np.stack([batch.sample_hashes for batch in batches]), micro_batch_size))
        for batches in zip(*by_rank, strict=True)
    ], by_rank[0][-1].cursor


def test_layouts_read_the_same_batches(sets):
    alone, _ = hashes(sets, 1, 8, 12)
    assert len(set(alone)) == 12
    assert hashes(sets, 2, 2, 12)[0] == alone
    assert hashes(sets, 4, 1, 12)[0] == alone


def test_a_resumed_run_goes_on_with_the_same_batches_on_another_layout_and_over_a_skip_range(sets):
    skips = [(20, 44), (70, 72)]
    whole, _ = hashes(sets, 1, 4, 12, skip_ranges=skips)
    _, cursor = hashes(sets, 1, 4, 5, skip_ranges=skips)
    assert hashes(sets, 2, 4, 7, first_step=6, cursor=cursor, skip_ranges=skips)[0] == whole[5:]
    assert whole != hashes(sets, 1, 4, 12)[0]


def test_opening_touches_no_file_but_cards_and_index_headers(sets, monkeypatch):
    made = []
    monkeypatch.setattr(VerifiedFile, "_open", lambda self: made.append(self.path))
    opened(sets)
    assert made == []


def test_few_sources_are_open_at_once(sets, monkeypatch):
    monkeypatch.setattr(mixed_dataset, "_MAX_OPEN", 1)
    _, dataset, order = opened(sets)
    ids = [read(dataset, order, k) for k in range(60)]
    assert sum(not source.dataset._file.is_paused for source in dataset._opened.values()) == 1
    monkeypatch.undo()
    _, dataset, order = opened(sets)
    assert all(np.array_equal(one, read(dataset, order, k)) for k, one in enumerate(ids))


def test_the_card_of_the_whole_sums_its_parts(sets):
    mixture, _, _ = opened(sets)
    card = mixture.card("m")
    assert card.splits["train"].tokens == 1284 and card.splits["heldout"].tokens == 90
    assert card.tokenizer == TOKENIZER and card.fingerprint == mixture.plan.fingerprint


def test_a_path_names_a_dataset_elsewhere(sets, tmp_path):
    shutil.move(sets / "web", tmp_path / "elsewhere")
    mixture, _, _ = opened(sets, f"{{{tmp_path}/elsewhere: 1, code: 1}}")
    assert mixture.folders["elsewhere"] == tmp_path / "elsewhere"


def refused(sets, mixture, error, message):
    with pytest.raises(error, match=message):
        open_mixture(config(sets, mixture), samples_before)


def test_an_unknown_name_is_refused_with_the_nearest(sets):
    message = r"data.mixture.wbe: there is no prepared dataset at .*did you mean web\? \(prepared there so far: code"
    refused(sets, "{wbe: 1, code: 1}", ConfigError, message)


def test_another_tokenizer_is_refused_by_name(sets):
    with_tokenizer(sets / "web", replace(TOKENIZER, fingerprint="e" * 32))
    refused(sets, "{web: 1, code: 1}", ConfigError, r"code and web were prepared .* tokenizers \(their finger")
    with_tokenizer(sets / "web", replace(TOKENIZER, beginning_of_document=3))
    refused(sets, "{web: 1, code: 1}", ConfigError, r"different tokenizers \(their beginning_of_document: None and 3\)")
    with_tokenizer(sets / "web", None)
    refused(sets, "{web: 1, code: 1}", ConfigError, r"web names no tokenizer and .*code does")


def test_a_dataset_too_short_for_one_window_is_refused(sets, make_dataset):
    with_tokenizer(make_dataset("short", train=np.arange(T)), TOKENIZER)
    refused(sets, "{short: 1, code: 1}", DataError, r"short holds 8 tokens to train on, one sample .* needs 9")


def test_the_same_data_twice_is_refused(sets):
    shutil.copytree(sets / "web", sets / "again")
    refused(sets, "{web: 1, again: 1}", ConfigError, r"again and .*web hold the same data")


def test_a_damaged_source_is_refused(sets):
    with open(sets / "zh" / "train.bin", "ab") as file:
        file.write(b"x")
    refused(sets, "{web: 1, zh: 1}", DataError, "zh/train.bin: .* bytes, but the card says")
