"""Where tensors live and how the arithmetic is made repeatable."""

import torch


def pick(wish: str = "auto") -> torch.device:
    """'auto' takes a GPU where there is one; 'cpu', 'cuda' or 'cuda:1' are taken literally."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wish)


def autocast(device: torch.device):
    """bf16 arithmetic on a GPU, plain float32 on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
