"""Best-fit packing: which documents, or pieces of long ones, make up each sample. No files, no tokens, no torch.

packing_index.py stores the result for a dataset.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("flags", "<i4")])
"""A piece of a document: its first token in the split, its tokens, and whether it `BEGINS` and `ENDS` the document."""
BEGINS, ENDS = 1, 2


def cut(lengths: np.ndarray, first_token: int, seq_len: int) -> np.ndarray:
    """Cut documents into pieces of at most `seq_len + 1` tokens; return them as `PIECE`s in the documents' order.

    `lengths` are the documents' tokens, the first of which is at `first_token`. A document that fits stays whole. Of a
    longer one, each piece begins with the last token of the piece before it, as windows do: the token is the label of
    one and the input of the other, so each token but the document's first is a label once. Empty documents are left
    out.
    """
    lengths = lengths.astype(np.int64)
    starts = first_token + np.cumsum(lengths) - lengths
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    counts = np.maximum(1, -(-(lengths - 1) // seq_len))
    if len(counts) and counts.max() > 1:
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts, lengths, of = (np.repeat(x, counts) for x in (starts, lengths, counts))
    else:
        number, of = np.zeros_like(lengths), counts
    pieces = np.empty(len(number), PIECE)
    pieces["start"] = starts + number * seq_len
    pieces["length"] = np.minimum(seq_len + 1, lengths - number * seq_len)
    pieces["flags"] = BEGINS * (number == 0) + ENDS * (number == of - 1)
    return pieces


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items of given `lengths` (each from 1 to `capacity`) into bins, by best-fit decreasing.

    From the longest item down, each goes into the bin with the least room among those where it fits, or into a new one
    (Johnson et al., 1974; for documents: Ding et al., 2024, arXiv:2404.10830). Returns the items' numbers, bin after
    bin, and where each bin ends among them, both int64. Bins come sorted by their longest item. Items of equal length
    are taken in order, so the result is a pure function of the arguments.

    All items of one length are placed together: of the bins with the least room, each takes as many as it holds, and
    equal bins are one range of numbers. The time is that of sorting, plus a few microseconds for each such group.
    """
    order = np.argsort(lengths.astype(np.uint16 if capacity < 2**16 else np.int64), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    first_of = np.cumsum(counts) - counts
    bins: dict[int, list[tuple[int, int, int]]] = {}  # by room: (first bin, number of bins, items in each)
    rooms: list[int] = []  # of `bins`, ascending
    placed: list[tuple[int, int, int, int]] = []  # (number of items, first bin, items before in each, added to each)
    num_bins = 0

    def keep(room: int, first: int, number: int, items: int) -> None:
        if number and room:
            if room not in bins:
                insort(rooms, room)
                bins[room] = []
            bins[room].append((first, number, items))

    groups = np.flatnonzero(counts)[::-1]
    for length in groups.tolist():
        left = int(counts[length])
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                first, number, items = bins[room].pop()
                if not bins[room]:
                    del bins[room], rooms[at]
            else:
                room = capacity
                first, number, items = num_bins, -(-left // (capacity // length)), 0
                num_bins += number
            each = room // length
            full = min(number, left // each)
            rest = min(left - full * each, each) if full < number else 0
            if full:
                placed.append((full * each, first, items, each))
            if rest:
                placed.append((rest, first + full, items, rest))
            keep(room - each * length, first, full, items + each)
            keep(room - rest * length, first + full, int(rest > 0), items + rest)
            used = full + (rest > 0)
            keep(room, first + used, number - used, items)
            left -= full * each + rest
    starts = np.concatenate([order[first_of[n] : first_of[n] + counts[n]] for n in groups] or [order])
    return _by_bin(starts, np.array(placed, np.int64).reshape(-1, 4), num_bins)


def _by_bin(items: np.ndarray, placed: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `items`, which are in the order of `placed`, bin after bin; and where each bin ends."""
    sizes, first, before, each = placed.T
    offset = np.arange(len(items)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    turn, slot = np.divmod(offset, np.repeat(each, sizes))
    bin_of = np.repeat(first, sizes) + turn
    slot += np.repeat(before, sizes)
    ends = np.cumsum(np.bincount(bin_of, minlength=num_bins))
    result = np.empty(len(items), np.int64)
    result[np.concatenate([[0], ends[:-1]])[bin_of] + slot] = items
    return result, ends
