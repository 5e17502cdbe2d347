"""A flat range of a row-major block is a few rectangles that cover it exactly."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatrain.checkpoint.piece import Piece, rectangles


@pytest.mark.parametrize("seed", range(60))
def test_rectangles_cover_a_range_exactly_once(seed):
    """Writing a range's elements through its rectangles fills these positions of the block, each once, in order."""
    draw = random.Random(seed)
    shape = [draw.randint(1, 6) for _ in range(draw.randint(0, 4))]
    origin = [draw.randint(0, 5) for _ in shape]
    total = math.prod(shape)
    start = draw.randint(0, total)
    stop = draw.randint(start, total)
    cut = rectangles(start, stop, shape, origin)
    assert len(cut) <= max(1, 2 * len(shape) - 1)
    flat = torch.arange(start, stop)
    whole = torch.full(shape, -1)
    for offsets, sizes, at in cut:
        window = tuple(slice(o - base, o - base + size) for o, base, size in zip(offsets, origin, sizes, strict=True))
        assert (whole[window] == -1).all()
        whole[window] = flat[at : at + math.prod(sizes)].view(sizes)
    expected = torch.full((total,), -1)
    expected[start:stop] = flat
    assert torch.equal(whole.reshape(-1), expected)


def test_a_piece_aliases_its_owners_memory():
    """Writing through a rectangle changes the flat tensor it was cut from; arithmetic on a piece is refused."""
    flat = torch.zeros(7)
    piece = Piece(flat, 5, (4, 4))
    assert tuple(piece.shape) == (4, 4) and len(piece.parts) == 2
    for _, _, part in piece.parts:
        part.fill_(1.0)
    assert flat.sum() == 7
    with pytest.raises(NotImplementedError):
        piece + 1


def test_a_piece_of_a_block_stands_where_the_block_does():
    """Four elements from the third on of a 2 x 3 block at (4, 1) of a 6 x 5 tensor."""
    whole = torch.zeros(6, 5)
    piece = Piece(torch.arange(1.0, 5.0), 2, whole.shape, (4, 1), (2, 3))
    assert tuple(piece.shape) == (6, 5)
    for offsets, sizes, part in piece.parts:
        whole[offsets[0] : offsets[0] + sizes[0], offsets[1] : offsets[1] + sizes[1]] = part
    assert whole[4].tolist() == [0, 0, 0, 1, 0] and whole[5].tolist() == [0, 2, 3, 4, 0] and whole[:4].sum() == 0
