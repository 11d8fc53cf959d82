"""Checkpoints of other projects, read without executing anything in them.

Reads a state_dict, alone or inside a dict, and reduces it to the encoder in torchvision's names:

* wrappers around it go, whatever their nesting: `module.encoder_q.conv1.weight` is `conv1.weight`;
* what trains it but is no part of it goes: projection heads, fc, MoCo's key encoder and queue;
* a Sequential of torchvision's children (BadEncoder's `f.f.3.0.conv1.weight`) gets their names:
  relu and pooling have an index but no tensors, so the indices in use name the others in order.

For a network from elsewhere (`elsewhere.py`) all names are known, so the wrapper is what stands before them.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from tcore.files import InputError, load_tensors, require
from tcore.models.encoder import Encoder, load_state

NESTS = ("state_dict", "model", "encoder")
WRAPPER = re.compile(r"(?:(?:module|encoder_q|encoder|backbone|visual|f)\.)*")
OTHERS = re.compile(r"(_?fc|g|head|linear|projector|projection|projection_head|predictor|encoder_k)\.|queue")
CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The encoder's tensors in a .safetensors file or in one of torch (.pt, .pth, .tar), on the CPU.

    Raises InputError for a file that cannot be read without running code, for one without
    tensors and where two tensors end up with one name.
    """
    content = _tensors(path)
    parts = [(*WRAPPER.sub("", key, count=1).partition("."), tensor) for key, tensor in content.items()]
    indices = sorted({int(first) for first, *_ in parts if first.isdecimal()})
    children = dict(zip(map(str, indices), CHILDREN, strict=False))
    found: dict[str, Tensor] = {}
    for first, dot, rest, tensor in parts:
        name = children.get(first, first) + dot + rest
        if name in found:
            raise InputError(f"{path}: two tensors are called {name}; keep one encoder in the file")
        if not OTHERS.match(name):
            found[name] = tensor
    if not found:
        raise InputError(f"{path}: no encoder's tensors in it, only {', '.join(content)[:200]!r}")
    return found


def read_named(path: str | Path, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of `network` in such a file, under its own names, and those that it should not have.

    What stands beside the network (a projection head) or belonged to its classifier, where it now has an
    nn.Identity, is left out.
    """
    content = _tensors(path)
    expected = set(network.state_dict())
    longest = max(expected, key=len, default="")
    prefixes = [key[: -len(longest)] for key in content if key.endswith(longest)] or [""]
    prefix = max(
        prefixes, key=lambda prefix: (sum(prefix + key in content for key in expected), -len(prefix))
    )
    below = {key[len(prefix) :]: tensor for key, tensor in content.items() if key.startswith(prefix)}
    parts = {key.partition(".")[0] for key in expected}
    removed = tuple(f"{name}." for name, part in network.named_modules() if isinstance(part, nn.Identity))
    return {
        key: tensor
        for key, tensor in below.items()
        if key in expected or (key.partition(".")[0] in parts and not key.startswith(removed))
    }


def import_encoder(
    path: str | Path,
    architecture: str,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Encoder:
    """An encoder with the tensors of a foreign checkpoint, in eval mode.

    The file knows neither `architecture` nor the `mean` and `std` (of pixels in [0, 1]) that it
    was trained with. Raises InputError, naming the file, where its tensors do not fit.
    """
    if not min(std) > 0:
        raise InputError(f"{path}: std {tuple(std)} should be positive; pixels are in [0, 1]")
    encoder = Encoder(architecture, image_size, mean, std)
    if ":" in architecture:
        load_state(encoder.network, read_named(path, encoder.network), path)
    else:
        load_state(encoder, read_checkpoint(path), path)
    if bad := [name for name, tensor in encoder.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"{path}: not all numbers in {', '.join(bad[:4])} are finite; its training diverged")
    return encoder.eval()


def _tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, those of the encoder where they have a part of their own."""
    content = load_tensors(path)[0] if Path(path).suffix == ".safetensors" else _load(path)
    for nest in NESTS:
        content = content[nest] if isinstance(content.get(nest), dict) else content
    if found := {str(key): tensor for key, tensor in content.items() if isinstance(tensor, Tensor)}:
        return found
    raise InputError(f"{path}: no encoder's tensors in it, only {', '.join(map(str, content))[:200]!r}")


def _load(path: str | Path) -> dict:
    require(path, "whoever published it")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise InputError(
            f"{path}: not a checkpoint that can be read without running code in it "
            f"({type(error).__name__}); save its state_dict alone, as safetensors"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a state_dict; save that instead")
    return content
