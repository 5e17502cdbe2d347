"""Personal data is found where it was planted, by kind, and what merely looks like it stays.

The planted values are Faker's and some of known forms; what must stay are versions, dates, sums, hashes and so on.
"""

import random
import re
import uuid

import pytest
from faker import Faker

from megatrain.data.corpus.document import Document, Removal
from megatrain.data.corpus.recipe import build_recipe, new_reports, run_recipe
from megatrain.data.corpus.steps.personal_data import KINDS
from megatrain.errors import ConfigError

PLANTED = 300
MADE = [Faker(name) for name in ("en_US", "zh_CN", "en_GB", "de_DE")]
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def masked(text, **parameters):
    (step,) = build_recipe([{"personal_data": parameters}])
    document = Document(text, "d")
    assert step.apply(document) is None
    return document.text, dict(document.counts)


def planted(kind, number):
    english, chinese, british, german = MADE
    for place, fake in enumerate(MADE):
        fake.seed_instance(number * 10 + place)
    chosen = random.Random(number)
    area, middle, last = chosen.choice((212, 415, 312, 617)), chosen.randint(200, 999), chosen.randint(1000, 9999)
    tail = f"{chosen.randint(1, 0xFFFF):x}"

    def token(length):
        return "".join(chosen.choices(LETTERS, k=length))

    makers = {
        "email": [
            english.email,
            english.company_email,
            chinese.email,
            lambda: f"{english.user_name()}+x@mail.example.co.uk",
        ],
        "ip": [english.ipv4_public, english.ipv4_public, lambda: f"2001:4860:{number:x}::{tail}"],
        "iban": [english.iban, german.iban, lambda: " ".join(re.findall(".{1,4}", british.iban()))],
        "card": [
            english.credit_card_number,
            lambda: " ".join(re.findall(".{4}", english.credit_card_number("visa16"))),
        ],
        "national_id": [english.ssn, chinese.ssn, lambda: "AB 12 34 56 C"],
        "phone": [
            chinese.phone_number,
            lambda: f"({area}) {middle}-{last}",
            lambda: f"+1 {area}-{middle}-{last}",
            lambda: f"+44 20 7946 0{chosen.randint(100, 999)}",
            lambda: f"{area}-{middle}-{last}",
        ],
        "secret": [
            lambda: f"AKIA{token(16).upper()}",
            lambda: f"ghp_{token(36)}",
            lambda: f"sk-{token(40)}",
            lambda: f"hf_{token(34)}",
            lambda: f"xoxb-{chosen.randint(10**11, 10**12)}-{token(24)}",
        ],
    }
    return chosen.choice(makers[kind])()


FRAMES = ["Write to {} today.", "联系方式：{}，谢谢。", "value = {}\n", "({})", "Please use {}; it works.", "{}"]


@pytest.mark.parametrize("kind", KINDS)
def test_planted_values_are_masked_by_their_kind(kind):
    """Recall per kind, each value in a sentence, in brackets, at the end, and between Chinese."""
    missed = []
    for number in range(PLANTED):
        value = planted(kind, number)
        frame = FRAMES[number % len(FRAMES)]
        text, _ = masked(frame.format(value))
        if text != frame.format(f"<{kind.upper()}>"):
            missed.append((value, text))
    assert len(missed) <= 0.05 * PLANTED, (len(missed), missed[:10])


def ordinary(number):
    """Return text with numbers and signs that are nobody's."""
    chosen = random.Random(number)
    digits = "".join(chosen.choices("0123456789", k=16))
    return chosen.choice(
        [
            lambda: f"Version 1.{chosen.randint(0, 40)}.{chosen.randint(0, 9)}.{chosen.randint(0, 9)} of the library",
            lambda: f"released on 20{chosen.randint(10, 26)}-0{chosen.randint(1, 9)}-1{chosen.randint(0, 9)} 10:30:45",
            lambda: f"costs {chosen.randint(1, 999)},{chosen.randint(100, 999)},{chosen.randint(100, 999)}.50 in all",
            lambda: f"commit {chosen.getrandbits(160):040x} of the branch",
            lambda: f"ISBN 978-0-{chosen.randint(100, 999)}-{chosen.randint(10000, 99999)}-{chosen.randint(0, 9)}",
            lambda: "std::vector<int> a::b::c; x[1:2:3]; 12:30:45; dead::beef",
            lambda: "the decorator @property, the handle @someone, a@b, x @ y, user@localhost",
            lambda: f"order {digits[:9]} and item {digits[:12]} of {digits[:7]}",
            lambda: f"pi is 3.14159{digits} and e is 2.71828{digits}",
            lambda: f"pages 101-{chosen.randint(110, 999)}, 1914-1918, 10.1000/{digits[:6]}.{digits[6:9]}",
            lambda: f"0x{chosen.getrandbits(64):016X}, {chosen.getrandbits(128):032x}, {digits[:4]}/{digits[4:8]}",
            lambda: "listens on 127.0.0.1 and 192.168.1.20, not on 0.0.0.0 or ::1 or fe80::1",
            lambda: f"coordinates 48.{digits[:6]}, 11.{digits[6:12]}; {digits[:3]} {digits[3:6]} km",
            lambda: "password = 'your-password-here' token: \"<your token>\"",
            lambda: f"UUID {uuid.UUID(int=chosen.getrandbits(128), version=4)}",
        ]
    )()


def test_what_merely_looks_alike_stays():
    wrong = []
    for number in range(1500):
        text = ordinary(number)
        found, counts = masked(text)
        if found != text:
            wrong.append((counts, text, found))
    assert len(wrong) <= 0.01 * 1500, (len(wrong), wrong[:12])


def test_the_same_text_gives_the_same_words_wherever_it_stands():
    text = "a@example.org wrote to b@example.org from 8.8.8.8"
    assert masked(text) == ("<EMAIL> wrote to <EMAIL> from <IP>", {"email": 2, "ip": 1})
    assert masked(masked(text)[0]) == (masked(text)[0], {})


def test_examples_hold_the_masked_text_alone():
    recipe = build_recipe(["personal_data", {"length": {"min_characters": 100}}])
    reports = new_reports(recipe)
    assert not run_recipe(recipe, Document("Write to ann@example.org today", "d"), reports, seed=0)
    (example,) = reports[0].examples
    assert example["after"] == reports[1].examples[0]["before"] == "Write to <EMAIL> today"
    assert "ann@" not in repr(reports)


def test_what_is_kept_of_a_removed_document_is_masked(tmp_path):
    """`data.write_text` writes the detail of a removal, which may quote the text."""
    words = tmp_path / "words.txt"
    words.write_text("ann@example.org\n")
    recipe = build_recipe([{"blocked_words": {"path": str(words)}}, "personal_data"])
    document = Document("Write to ann@example.org today", "d")
    assert not run_recipe(recipe, document, new_reports(recipe), seed=0)
    assert document.removal == ("blocked_words", Removal("blocked_word", "has <EMAIL>"))


def test_only_the_kinds_asked_for_are_masked():
    text = "a@example.org 8.8.8.8 4111 1111 1111 1111 10.0.0.1"
    assert masked(text, kinds=["card"])[0] == "a@example.org 8.8.8.8 <CARD> 10.0.0.1"
    assert masked(text, kinds=["ip"], public_addresses_only=False)[0] == "a@example.org <IP> 4111 1111 1111 1111 <IP>"
    with pytest.raises(ConfigError, match=r"personal_data.kinds: emial is not one of .*; did you mean email"):
        masked(text, kinds=["emial"])
    with pytest.raises(ConfigError, match=r"personal_data.regions: unknown XX"):
        masked("call 212-555-0100", regions=["XX"])


RUNS = ["@" * 20000, "a" * 50000 + "@", "1" * 50000, "1 " * 20000, ":" * 20000, "a.b" * 9000 + "@c", "eyJ" * 9000]
RUNS += ["-----BEGIN PRIVATE KEY-----" * 500, "token='" * 5000]


@pytest.mark.parametrize("text", RUNS, ids=lambda text: text[:9])
def test_long_runs_do_not_hang(text):
    """A pattern of quadratic time would take minutes here."""
    assert masked(text)[0]


def test_examples_of_all_steps_are_masked_whatever_their_order():
    secret = "mail jane.doe@corp.example, " * 71 + "jane.doe@corp.example"  # an address where the excerpt is cut
    recipe = build_recipe(
        [{"length": {"max_characters": 2100}}, "unicode", "personal_data", {"length": {"min_characters": 100}}]
    )
    reports = new_reports(recipe)
    for number, text in enumerate([secret + " x" * 100, "call\u00a0jane.doe@corp.example", secret]):
        run_recipe(recipe, Document(text, str(number)), reports, seed=1)
    too_long, repaired, masked, too_short = reports
    assert (too_long.rules, too_short.rules) == ({"too_long": 1}, {"too_short": 1})
    assert repaired.changed == 1 and masked.changed == 2
    assert too_long.examples[0]["before"].startswith("mail <EMAIL>, mail <EMAIL>")
    assert repaired.examples[0]["before"] == "call\u00a0<EMAIL>" and repaired.examples[0]["after"] == "call <EMAIL>"
    assert not any(
        "@" in str(value) or "jane" in str(value)
        for report in reports
        for one in report.examples
        for value in one.values()
    )
