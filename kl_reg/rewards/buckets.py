"""Batches for scoring texts on the device, of few shapes that do not depend on what else is scored."""
from collections.abc import Iterator, Sequence

_SHORTEST = 16          # tokens of the shortest bucket; the others are twice as long each
_BATCH = 512            # tokens of a batch


def batches(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """(which rows, (number of rows, length) to pad them to), for rows of these lengths, none above `longest`."""
    buckets = {}
    for row, length in enumerate(lengths):
        size = min(max(_SHORTEST, 1 << (length - 1).bit_length()), longest)
        buckets.setdefault(size, []).append(row)
    for size, rows in sorted(buckets.items()):
        count = max(_BATCH // size, 1)
        for first in range(0, len(rows), count):
            yield rows[first:first + count], (count, size)
