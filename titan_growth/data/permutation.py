"""Pseudo-random permutations of 0..n-1 that need no memory: any element is computed on its own.

A Feistel network is a bijection on pairs of half-words whatever its round function is, so it shuffles the 2**(2h)
numbers of 2h bits. For an n in between, the network is applied again until the number is below n ("cycle walking"),
which stays a bijection. Blocks of a corpus of any size are thus shuffled without a list of them, and a run that is
resumed in the middle of an epoch finds its place at once.
"""

from __future__ import annotations

import hashlib

_NUM_ROUNDS = 6
# Tiny networks shuffle badly; more bits only cost more walking, which for small n is cheap enough.
_SMALLEST_HALF_BITS = 4
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
        """Where `index` (0 <= index < size) goes."""
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
    """A 64-bit word in which every bit depends on every bit of the argument."""
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & _MASK_64
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & _MASK_64
    return value ^ (value >> 33)
