"""The random numbers of tiny-cuda-nn's initial parameters: generator PCG-XSH-RR 64/32 (O'Neill
2014), and the order in which they are used."""

from __future__ import annotations

import copy

import numpy as np

MULTIPLIER = 6364136223846793005
BITS = 2**64
THREADS = 128  # a block, where a GPU makes the parameters of grids
DRAWS = 4  # a thread


class Pcg32:
    """state ← state · MULTIPLIER + increment, modulo 2^64; 32 bits of each state are given out.

    Args:
        seed: starting state, 0 to 2^64 - 1.
        stream: which of the sequences, 0 to 2^63 - 1.
    """

    def __init__(self, seed: int, stream: int = 1):
        self.increment = (2 * stream + 1) % BITS
        self.state = (self.increment + seed) % BITS
        self.advance(1)

    def advance(self, n: int) -> None:
        """Leave out n numbers."""
        multiplier, increment = MULTIPLIER, self.increment
        while n > 0:
            if n % 2:
                self.state = (self.state * multiplier + increment) % BITS
            increment = (multiplier + 1) * increment % BITS
            multiplier = multiplier * multiplier % BITS
            n //= 2

    def integers(self, n: int) -> np.ndarray:
        """The next n numbers, (n,) uint32. Each pass doubles the states that are known."""
        states = np.empty(n, np.uint64)
        states[:1] = self.state
        multiplier, increment, found = MULTIPLIER, self.increment, 1
        while found < n:
            more = min(found, n - found)
            states[found : found + more] = states[:more] * np.uint64(multiplier) + np.uint64(
                increment
            )
            increment = (multiplier + 1) * increment % BITS
            multiplier = multiplier * multiplier % BITS
            found += more
        self.advance(n)
        bits = ((states >> np.uint64(18) ^ states) >> np.uint64(27)).astype(np.uint32)
        turn = (states >> np.uint64(59)).astype(np.uint32)
        return bits >> turn | bits << (-turn & np.uint32(31))

    def floats(self, n: int) -> np.ndarray:
        """The next n uniform numbers in [0, 1), (n,) float32, multiples of 2^-23."""
        return (self.integers(n) >> np.uint32(9)).astype(np.float32) * np.float32(2.0**-23)


def uniform(generator: Pcg32, n: int, bound: float) -> np.ndarray:
    """(n,) float32 uniform in [-bound, bound), one after another: weights of networks."""
    bound = np.float32(bound)
    return generator.floats(n) * np.float32(2) * bound - bound


def uniform_of_threads(generator: Pcg32, n: int, bound: float) -> np.ndarray:
    """(n,) float32 uniform in [-bound, bound), as a GPU makes them: features of grids.

    Thread i draws numbers 4 i to 4 i + 3 of the sequence, for i, i + T, i + 2 T and i + 3 T of the
    result, with T threads in all; what it makes of them is rounded once (a fused multiply-add).
    """
    threads = -(-n // (DRAWS * THREADS)) * THREADS
    draws = copy.copy(generator).floats(DRAWS * threads) if n else np.empty(0, np.float32)
    generator.advance(n)
    ordered = draws.reshape(threads, DRAWS).T.reshape(-1)[:n].astype(np.float64)
    bound = float(np.float32(bound))
    return (ordered * (2 * bound) - bound).astype(np.float32)
