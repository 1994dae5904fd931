"""Pseudo-random permutations of 0..n-1 without memory: each element is computed on its own.

A Feistel network permutes the numbers of 2h bits, whatever its round function. For any n it is applied again until the
number is below n ("cycle walking"), still a bijection. So a corpus of any size is shuffled without a list of its
blocks, and a run resumes in the middle of an epoch at once.
"""

from __future__ import annotations

import hashlib

_NUM_ROUNDS = 6
_SMALLEST_HALF_BITS = 4  # smaller networks shuffle badly; the extra walking is cheap
_MASK_64 = 2**64 - 1


class Permutation:
    """The permutation of range(size) that belongs to a (seed, epoch)."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs a positive size, not {size}")
        self._size = size
        self._half_bits = max(_SMALLEST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(f"blocks {seed} {epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(_NUM_ROUNDS)]

    def __call__(self, index: int) -> int:
        """The image of `index` (0 <= index < size)."""
        if not 0 <= index < self._size:
            raise IndexError(f"{index} is not in range({self._size})")
        value = self._shuffle(index)
        while value >= self._size:
            value = self._shuffle(value)
        return value

    def _shuffle(self, value: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << self._half_bits) | right


def _mix(value: int) -> int:
    """A 64-bit mix: every bit depends on every bit of the argument."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & _MASK_64
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & _MASK_64
    return value ^ (value >> 33)
