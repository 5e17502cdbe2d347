"""Context parallelism: which tokens a rank holds, and attention over ranks that equals attention in one process."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from support.peak import peak_bytes
from support.ranks import run_ranks

from megatrain.data.batch import MicroBatch
from megatrain.kernels.attention import Documents, attention, document_mask
from megatrain.kernels.block_attention import block_attention
from megatrain.parallel.context import exchange, local_slice, make_attend, positions_of

BATCH, HEADS, KV_HEADS, LENGTH, HEAD_SIZE = 2, 4, 2, 8, 3
MASKS = {"ulysses": ["none", "dense", "documents"], "ring": ["none", "dense"]}


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_token_belongs_to_one_rank(kind, size):
    positions = torch.cat([positions_of(kind, 16, rank, size) for rank in range(size)])
    assert positions.sort().values.tolist() == list(range(16))


def test_ring_ranks_have_equally_many_keys_to_attend_to():
    work = {int((positions_of("ring", 24, rank, 3) + 1).sum()) for rank in range(3)}
    assert len(work) == 1
    assert positions_of("ring", 24, 0, 3).tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert positions_of("ulysses", 24, 1, 3).tolist() == list(range(8, 16))


def test_a_slice_cuts_every_field_except_the_documents():
    tokens = torch.arange(16).view(2, 8)
    documents, weights = Documents([[4, 4], [8]]), tokens / 2
    batch = MicroBatch(tokens, tokens + 1, documents=documents, loss_weights=weights)
    part = local_slice(batch, "ring", 1, 2)
    own = [2, 3, 4, 5]
    assert part.positions.tolist() == own
    assert torch.equal(part.tokens, tokens[:, own]) and torch.equal(part.labels, tokens[:, own] + 1)
    assert torch.equal(part.loss_weights, weights[:, own]) and part.documents is documents


def test_a_slice_cuts_given_positions():
    tokens = torch.arange(16).view(2, 8)
    part = local_slice(MicroBatch(tokens, tokens, positions=tokens % 4), "ulysses", 1, 2)
    assert part.positions.tolist() == [[0, 1, 2, 3]] * 2 and part.loss_weights is None


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, heads, LENGTH, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    documents = Documents([[3, 4, 1]] * BATCH)
    return q, k, v, upstream, documents, document_mask(documents.ids(), torch.float64)


def attend_over_ranks(world):
    """For each kind and mask that it takes: this rank's output, its gradients and the blocks it computed."""
    group, found = torch.distributed.group.WORLD, {}
    *tensors, documents, mask = inputs()
    for kind, masks in MASKS.items():
        own = positions_of(kind, LENGTH, world.rank, world.size)
        for name in masks:
            given = {"none": None, "dense": mask, "documents": documents}[name]
            q, k, v, upstream = (x[:, :, own].clone().requires_grad_() for x in tensors)
            attend = make_attend(kind, group)
            with patch("megatrain.parallel.context.block_attention", wraps=block_attention) as blocks:
                y = attend(q, k, v, given, 0.0)
            y.backward(upstream.detach())
            found[kind, name] = (y.detach(), q.grad, k.grad, v.grad, blocks.call_count)
    x = torch.arange(8.0).view(2, 4) + 10 * world.rank
    there = exchange(x, group, scatter=1, gather=0)
    return found, there, exchange(there, group, scatter=0, gather=1)


def test_attention_over_ranks_is_attention_in_one_process():
    """Outputs and gradients, in float64; ring ranks compute only blocks on or below the diagonal."""
    ranks = run_ranks(attend_over_ranks, 2)
    *tensors, _, mask = inputs()
    for kind, masks in MASKS.items():
        for given in masks:
            q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
            expected = attention(q, k, v, None if given == "none" else mask, 0.0)
            expected.backward(tensors[3])
            for rank, (found, _, _) in enumerate(ranks):
                own = positions_of(kind, LENGTH, rank, 2)
                whole = (expected.detach(), q.grad, k.grad, v.grad)
                for name, part, full in zip("oqkv", found[kind, given], whole, strict=False):
                    torch.testing.assert_close(part, full[:, :, own], msg=f"{kind}, {given}, rank {rank}, {name}")
                if kind == "ring":
                    assert found[kind, given][4] == 5  # of 8: 2 x 2 halves with each of 2 ranks
    for rank, (_, there, back) in enumerate(ranks):
        both = torch.cat([torch.arange(8.0).view(2, 4), torch.arange(8.0).view(2, 4) + 10])
        assert torch.equal(there, both[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(back, torch.arange(8.0).view(2, 4) + 10 * rank)


def peaks_of_a_ring(world, lengths):
    """Return the most bytes that attention and its gradients allocate at once, for each length of the sequence."""
    attend, found = make_attend("ring", torch.distributed.group.WORLD), []
    for length in lengths:
        q, k, v = (torch.randn(1, heads, length // world.size, 16, requires_grad=True) for heads in (4, 2, 2))
        upstream = torch.ones_like(q)
        found.append(peak_bytes(lambda: attend(q, k, v, None, 0.0).backward(upstream)))  # noqa: B023
    return found


def test_memory_of_a_ring_grows_with_the_sequence_and_not_with_its_square():
    """Twice the tokens, twice the peak; scores of a block would quadruple. Kernels have buffers of a fixed size."""
    for short, long in run_ranks(peaks_of_a_ring, 2, (4096, 8192)):
        assert 1.7 * short < long < 2.1 * short
