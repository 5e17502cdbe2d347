"""Divisors and nearest numbers, for messages that say which sizes fit together. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    low = [count for count in range(1, int(number**0.5) + 1) if number % count == 0]
    return sorted({*low, *(number // count for count in low)})


def listed(numbers: list[int], most: int = 24) -> str:
    """Return the first `most` numbers as text for a message."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def nearest(numbers: Sequence[int], given: int) -> list[int]:
    """Return the numbers on both sides of `given` that are closest to it. `numbers` ascend and lack it."""
    return [*[number for number in numbers if number < given][-1:], *[n for n in numbers if n > given][:1]]


def either(numbers: Sequence[int]) -> str:
    """Return alternatives as text for a message."""
    return " or ".join(map(str, numbers))
