"""Networks that others define, by name: `torchvision:resnet50`, `timm:convnext_tiny`, `my_package.nets:Net`.

* `torchvision:` any of its classification networks that ends in a linear classifier, which is taken off;
  not those with auxiliary outputs.
* `timm:` any of its networks, without its classifier; only where timm is installed.
* `module:name` a class or function of your own, called without arguments, whose result maps normalised images
  (N, 3, H, W) to features (N, d) or (N, d, h, w). Importing it runs its code: it must stand among the names,
  parted by spaces, in the environment variable TCORE_RUN_CODE. The workflow sets it where the configuration
  says `run_code: true`; no encoder file can.
"""

import difflib
import importlib
import os

from torch import nn

from tcore.files import InputError

ALLOWED = "TCORE_RUN_CODE"
LIBRARIES = ("torchvision", "timm")
AUXILIARY = ("googlenet", "inception_v3")


def build(architecture: str, image_size: int) -> nn.Module:
    """A new network; nn.Identity stands where its classifier was.

    Raises InputError for what is unknown, not installed, not allowed or fails.
    """
    source, _, name = architecture.partition(":")
    if source == "torchvision":
        models = _torchvision(name)
        sized = {"image_size": image_size} if name.startswith("vit_") else {}
        network = _call(architecture, lambda: models.get_model(name, weights=None, **sized))
        return _beheaded(architecture, network)
    if source == "timm":
        timm = _timm(name)
        known = timm.get_pretrained_cfg(name)
        sized = {"img_size": image_size} if known and known.fixed_input_size else {}
        return _call(architecture, lambda: timm.create_model(name, num_classes=0, **sized))
    return _own(architecture, source, name)


def known(architecture: str) -> dict:
    """`image_size`, `mean` and `std` that the library's own weights of a network were trained with; or {}."""
    source, _, name = architecture.partition(":")
    if source == "torchvision":
        use = _torchvision(name).get_model_weights(name).DEFAULT.transforms()
        return {"image_size": use.crop_size[0], "mean": list(use.mean), "std": list(use.std)}
    if source == "timm" and (found := _timm(name).get_pretrained_cfg(name)):
        return {"image_size": found.input_size[1], "mean": list(found.mean), "std": list(found.std)}
    return {}


def _torchvision(name: str):
    from tcore.torchvision_cpu import torchvision

    models = torchvision.models
    names = [n for n in models.list_models(module=models) if n not in AUXILIARY]
    _check("torchvision", name, names)
    return models


def _timm(name: str):
    try:
        import timm

        import tcore.torchvision_cpu  # noqa: F401  timm imports torchvision
    except ImportError as error:
        raise InputError(
            f"timm:{name}: timm is not installed ({error}); install it with `pip install timm`"
        ) from error
    _check("timm", name.partition(".")[0], timm.list_models())
    return timm


def _check(library: str, name: str, names: list[str]) -> None:
    if name not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3)) or "its list of models"
        raise InputError(f"{library}:{name}: no such classification network in {library}; see {near}")


def _own(architecture: str, module: str, name: str) -> nn.Module:
    if architecture not in os.environ.get(ALLOWED, "").split():
        raise InputError(
            f"{architecture}: a network of your own, whose code would run; if you trust it, say "
            "`run_code: true` in the encoder's entry of the configuration, or --run-code"
        )
    try:
        network = getattr(importlib.import_module(module), name)()
    except Exception as error:  # the code is not ours and can raise anything
        raise InputError(
            f"{architecture}: {type(error).__name__}: {error}; {module} should be importable "
            f"(its folder in PYTHONPATH) and {name}() should return the network"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{architecture}: {name}() should return an nn.Module, not {type(network).__name__}")
    return network


def _call(architecture: str, make) -> nn.Module:
    try:
        return make()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # such as a size that does not fit
        raise InputError(f"{architecture}: {error or type(error).__name__}") from error


def _beheaded(architecture: str, network: nn.Module) -> nn.Module:
    *_, last = ["", *(name for name, module in network.named_modules() if isinstance(module, nn.Linear))]
    if not last:
        raise InputError(
            f"{architecture}: does not end in a linear classifier, so its features are unclear; "
            "wrap it in a module of your own that returns them"
        )
    parent, _, child = last.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network
