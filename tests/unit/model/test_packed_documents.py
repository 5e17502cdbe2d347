"""Packed documents, masked and with positions of their own, are to the model what each of them is alone."""

import pytest
import torch
from support.jobs import gpt2, llama

from megatrain.data.loader import with_documents
from megatrain.model.init import build_model

END = 5
MODELS = {
    "llama": llama(init_std=0.1),
    "gpt2": gpt2(),
    "window": llama(init_std=0.1, sliding_window=3),
    "scaled": llama(init_std=0.1, rope_scaling="llama3", rope_factor=8, rope_original_seq_len=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_each_document_are_those_of_the_document_alone(name):
    """By windows, whose documents are known by their ends, and by packed samples, whose documents are given."""
    torch.manual_seed(0)
    model = build_model(MODELS[name], seed=3)
    lengths = [[7, 1, 5, 3], [4, 12]]
    tokens = torch.randint(10, 100, (2, 16))
    for row, pieces in zip(tokens, lengths, strict=True):
        row[torch.tensor(pieces).cumsum(0) - 1] = END
    by_ends = with_documents(tokens, tokens, END, reset_positions=True)
    given = with_documents(tokens, tokens, END, reset_positions=True, lengths=lengths)
    assert by_ends.documents.lengths == given.documents.lengths
    assert torch.equal(by_ends.positions, given.positions)
    with torch.no_grad():
        together = model(tokens, positions=given.positions, documents=given.documents)
        shifted = model(tokens, documents=given.documents)
        for row, pieces in enumerate(lengths):
            for document, logits in zip(tokens[row].split(pieces), together[row].split(pieces), strict=True):
                assert torch.allclose(model(document[None])[0], logits, rtol=1e-4, atol=1e-5)
    if name == "gpt2":  # with RoPE only distances matter, so a mask alone gives the same
        assert not torch.allclose(together, shifted, atol=1e-3)
