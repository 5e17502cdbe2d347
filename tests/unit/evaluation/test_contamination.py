"""Texts of an evaluation are found in training documents as the step `decontaminate` finds them."""

import json
import random

from megatrain.data.corpus.document import Document
from megatrain.data.corpus.steps.decontaminate import Decontaminate
from megatrain.evaluation.contamination import find_contamination

WORDS = [f"word{number}" for number in range(400)]


def test_texts_are_found_where_the_cleaning_step_finds_them(tmp_path):
    """Of 40 texts those of 13 words or more by any 13 of them, and those of 8 to 12 as a whole."""
    chooser = random.Random(1)
    texts = [" ".join(chooser.choices(WORDS, k=chooser.choice([5, 8, 10, 12, 13, 20, 40]))) for _ in range(40)]
    documents = []
    for text in texts[::2]:
        words = text.split()
        part = words[2:15] if len(words) > 15 else words
        documents.append(" ".join(chooser.choices(WORDS, k=9)) + f" {', '.join(part).upper()}! " + "x " * 30)
    documents += [" ".join(text.split()[:12]) for text in texts[1::2] if len(text.split()) > 13]
    found = find_contamination(texts, iter(documents))
    assert found.training_documents == len(documents)
    for number, text in enumerate(texts):
        assert found.too_short[number] is (len(text.split()) < 8)
        if found.too_short[number]:
            assert not found.occurs[number]
            continue
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps({"text": text}))
        step = Decontaminate(sets=[str(file)])
        expected = any(step.apply(Document(id="x", source="x", text=document)) is not None for document in documents)
        assert found.occurs[number] is expected, text
    assert 10 < sum(found.occurs) < 30
