"""The end of prepare says what a user may not have wanted."""

from pathlib import Path

import pytest

from megatrain.data.card import Card, SplitCard
from megatrain.data.preparation_summary import _step, summary


def told(train, heldout, cleaning=()):
    """Return what is said of a dataset with so many tokens, 4 bytes each."""
    splits = {
        name: SplitCard(3, 4 * tokens, tokens, "uint16", 2 * tokens, 0, "", [])
        for name, tokens in (("train", train), ("heldout", heldout))
        if tokens
    }
    return list(summary(Path("d"), Card("d", "0" * 32, splits, None, cleaning=list(cleaning))))


def step(name, before, after):
    return {"name": name, "documents_in": before, "documents_out": after, "rules": {}, "changes": {}, "changed": 0}


def test_small_text_is_in_kilobytes():
    assert "36.0 kB of text" in told(9000, 0)[1] and "0.1 MB of text" in told(25_000, 0)[1]


@pytest.mark.parametrize(("heldout", "noted"), [(100, False), (120, True)])
def test_much_held_out_text_is_noted(heldout, noted):
    notes = [line for line in told(1000, heldout) if line.startswith("note: ")]
    assert bool(notes) == noted
    assert not noted or notes[0].startswith(
        "note: 11% of the tokens are held out, as data.heldout_fraction counts docu"
    )


def test_few_documents_left_are_noted_with_the_step_that_removed_most():
    steps = [step("language", 110, 100), step("gopher_quality", 100, 9), step("unicode", 9, 9)]
    assert told(1000, 0, steps)[-1] == (
        "note: cleaning removed 101 of 110 documents, most of them by gopher_quality; megatrain report d shows examples"
    )
    assert not [line for line in told(1000, 0, [step("language", 110, 56)]) if line.startswith("note: ")]


def test_documents_that_are_kept_do_not_stand_among_those_removed():
    def of(**counts):
        splits = {"train": SplitCard(3, 4, 1, "uint16", 2, 0, "", [])}
        return list(summary(Path("d"), Card("d", "0" * 32, splits, None, counts={"read": 9, "empty": 2, **counts})))[2:]

    assert of(markup=3, undecodable=2, skipped_undecodable=1) == [
        "  documents: read 9, empty 2, skipped undecodable 1",
        "  of these: with HTML tags 3, with replaced bytes that are not UTF-8 1",
    ]
    assert of(markup=0, undecodable=1, skipped_undecodable=1) == ["  documents: read 9, empty 2, skipped undecodable 1"]


def test_the_splits_are_in_columns():
    train, heldout = told(25_000, 100)[1:3]
    assert train == "  train:   3 documents, 25,000 tokens, 0.1 MB of text (4.00 bytes per token)"
    assert [train.index(word) for word in ("documents", " tokens")] == [
        heldout.index(word) for word in ("documents", " tokens")
    ]


def test_a_step_that_changed_nothing_says_what_it_counted():
    step = {"name": "url_filter", "documents_in": 9, "documents_out": 8, "changed": 0, "rules": {"blocked_word": 1}}
    assert _step(step | {"changes": {"no_url": 7}}) == "  url_filter: 9 documents, 1 removed (blocked word 1), no url 7"
    assert _step(step | {"documents_out": 9, "changes": {}}) == "  url_filter: 9 documents, nothing to do"
