"""Random streams derived from one seed and the names of what they are for.

`derive(seed, "badnets", "selection")` depends on nothing else, so adding a stream or
a step never moves another one.
"""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: str = "cpu"):
    """A torch generator for the stream called `names`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *names))
