"""The funnel accounts for every record, from the counts in the card."""

from megatrain.data.card import Card, SplitCard
from megatrain.data.funnel import Stage, funnel


def card(documents, counts, cleaning=()):
    split = SplitCard(documents, 100, 50, "uint16", 100, 100, "", [])
    return Card("c", "f", {"train": split}, None, counts=counts, cleaning=list(cleaning))


STEP = {
    "name": "length", "documents_in": 90, "documents_out": 80, "bytes_in": 900, "bytes_out": 880, "changed": 0,
    "rules": {"too_short": 7, "too_long": 3}, "changes": {},
}  # fmt: skip
MASK = STEP | {
    "name": "personal_data", "documents_in": 80, "documents_out": 80, "bytes_in": 880, "bytes_out": 870, "changed": 4,
    "rules": {}, "changes": {"email": 6},
}  # fmt: skip


def test_every_record_is_accounted_for():
    counts = {
        "read": 97, "oversized": 1, "left_out": 3, "left_out_not_html": 2, "left_out_error": 1,
        "kind_html": 60, "bad": 4, "bad_no_field": 3, "bad_not_json": 1, "bad_other": 0, "empty": 1,
        "undecodable": 5, "skipped_undecodable": 2, "cleaned_away": 10, "emptied": 1, "duplicates": 20,
        "near_duplicates": 9,
    }  # fmt: skip
    assert funnel(card(50, counts, [STEP, MASK])) == [
        Stage("no documents", 101, 98, reasons={"not_html": 2, "error": 1}),
        Stage("too large", 98, 97),
        Stage("bad records", 97, 91, reasons={"no_field": 3, "not_json": 1, "undecodable": 2}),
        Stage("empty", 91, 90),
        Stage("length", 90, 80, 900, 880, {"too_short": 7, "too_long": 3}, is_step=True),
        Stage("personal_data", 80, 80, 880, 870, changed=4, changes={"email": 6}, is_step=True),
        Stage("emptied by cleaning", 80, 79),
        Stage("exact duplicates", 79, 59),
        Stage("near_duplicates", 59, 50),
    ]


def test_what_no_stage_explains_is_shown_as_such():
    assert funnel(card(8, {"read": 10})) == [Stage("other", 10, 8)]
    assert funnel(card(10, {"read": 10})) == []
    assert funnel(card(2, {"read": 1, "cut_in_two": 1})) == [], "a document that was cut is one record"


def test_data_that_came_as_ids_has_no_funnel():
    assert funnel(card(10, {})) == []
