"""Where tensors live and how the arithmetic is made repeatable."""

import fcntl
import os
import tempfile
from functools import cache

import torch

PRECISION = "TCORE_PRECISION"  # environment variable: auto or float32

taken: list[int] = []  # files that `free_gpu` has locked, open until the process ends


def pick(wish: str = "auto") -> torch.device:
    """'auto' takes a GPU where there is one; 'cpu', 'cuda' or 'cuda:1' are taken literally.

    From here on cuDNN uses algorithms alone that give the same numbers again.
    """
    if wish == "auto":
        wish = f"cuda:{free_gpu()}" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.deterministic = True
    return torch.device(wish)


@cache
def free_gpu() -> int:
    """The first visible GPU that no other step of this user on this host has taken, 0 if all are.

    A step takes one by locking a file named after it, which ends with the process.
    """
    for number in range(torch.cuda.device_count()):
        uuid = torch.cuda.get_device_properties(number).uuid
        path = os.path.join(tempfile.gettempdir(), f"tcore-{os.getuid()}-gpu-{uuid}")
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
        else:
            taken.append(file)
            return number
    return 0


def autocast(device: torch.device):
    """bfloat16 arithmetic where the processor has it, unless PRECISION is float32; else plain float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=arithmetic(device) == "bfloat16")


def arithmetic(device: torch.device) -> str:
    """What `autocast` computes in on a device: bfloat16 or float32."""
    has_it = device.type == "cuda" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return "bfloat16" if has_it and os.environ.get(PRECISION, "auto") != "float32" else "float32"


def block(device: torch.device) -> int:
    """Images a forward pass where nothing is trained: what keeps a GPU busy, or stays in a CPU cache."""
    return 1024 if device.type == "cuda" else 128
