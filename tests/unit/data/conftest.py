"""Small datasets with known ids, written through the real writer."""

import numpy as np
import pytest

from megatrain.data.card import Card, card_of_written, fingerprint
from megatrain.data.indexed import IndexedWriter
from megatrain.data.indexed_dataset import IndexedDataset


@pytest.fixture
def make_dataset(tmp_path):
    """Make a dataset folder of given splits' ids and return the folder.

    A split is the ids of one document, or a list of arrays, a document each.
    """

    def make(name="d", dtype=np.uint16, **splits):
        folder = tmp_path / name
        folder.mkdir()
        cards = {}
        for split, ids in splits.items():
            writer = IndexedWriter(folder / split, np.dtype(dtype))
            documents = ids if len(ids) and isinstance(ids[0], np.ndarray) else [np.asarray(ids)]
            lengths = np.array([len(document) for document in documents], np.int32)
            writer.add(np.concatenate(documents).astype(dtype), lengths)
            writer.finish()
            cards[split] = card_of_written(writer, 3 * int(lengths.sum()))
        Card(name=name, fingerprint=fingerprint(cards), splits=cards, tokenizer=None).save(folder)
        return folder

    return make


@pytest.fixture
def train_set(make_dataset):
    """A train split of 1,000 ids, 0 to 999 in a shuffled order."""
    return IndexedDataset.open(make_dataset(train=np.random.default_rng(0).permutation(1000)), "train")
