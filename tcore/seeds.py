"""Random streams derived from one random seed and the names of what they are for.

`derive(seed, "badnets", "selection")` depends on nothing else, so adding a stream or
a step never moves another one.
"""

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, SplitMix64's increment


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: str = "cpu"):
    """A torch generator for the stream called `names`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *names))


def uniform(seed: int, *names: str | int, index: np.ndarray, size: int) -> np.ndarray:
    """(n, size) numbers in [0, 1), float64: row i depends on the seed, the names and `index[i]` alone.

    So an image gets the same numbers in any batch and any order. SplitMix64 (Steele, Lea, Flood:
    Fast Splittable Pseudorandom Number Generators, 2014), one generator for each index.
    """
    start = _mix(np.array([derive(seed, *names)], np.uint64) + np.asarray(index).astype(np.uint64) * GOLDEN)
    steps = np.arange(1, size + 1, dtype=np.uint64) * GOLDEN
    return (_mix(start[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function; uint64 arrays wrap around."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
