"""CLP: prunes the channels whose Lipschitz bound stands out; needs no data.

Zheng, Tang, Li, Liu: Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022. Assumes
that channels which carry a backdoor react to a small change of the input more strongly than others.
Output channel k of a convolution W (C_out, C_in, kh, kw) with batch norm (scale gamma, running variance
v, epsilon) behind it has the bound

    L_k = sigma_max(W_k as a C_in x (kh kw) matrix) |gamma_k| / sqrt(v_k + epsilon)

and is pruned (scale and shift set to 0) if L_k > mean + u std over its layer's channels (unbiased std).
Shortcut convolutions count as layers. Unit k of a hidden linear layer of the head has L_k = |W_k|_2
and is pruned (weights and bias set to 0) by the same rule; the layer of logits is left alone. The paper
prunes networks as a whole; the extension to linear layers is T-Core's, its bound is not stated there: this is
the 1 x d case of the same formula.

Deviations from the released code: epsilon under the root, as in batch norm itself (a dead channel with
v = 0 got an infinite bound, which made its layer's threshold infinite); batch norms are paired with
convolutions by the encoder's structure, so the pairing holds in shortcuts. T-Core chooses the scope by the
threat, which a defender does not know: the default is both. u = 3 is fixed; published sweeps over u
choose it by the attack's success.

On the small networks tried here the premise fails: bound and change of activation under the trigger
correlate weakly (docs/lab/clp.md).

Cost: no pass; the singular values of a C_in x (kh kw) matrix for each channel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tcore.defenses import _training as training
from tcore.defenses._interface import Received
from tcore.models.channels import channel_bounds, norms_behind
from tcore.models.classifier import Classifier

KIND = "model"
CLEAN = False
NEEDS_NORM = True
ORACLE = ()


@dataclass(frozen=True)
class Settings:
    u: float = 3.0  # channels above mean + u std of their layer are pruned, in [0, inf) [released code]
    scope: str = "both"  # one of encoder, head, both: convolutions, hidden linear layers [paper: encoder]


def outstanding(bounds: Tensor, u: float) -> Tensor:
    """Channels (C_out,) bool whose bound exceeds mean + u std."""
    return bounds > bounds.mean() + u * bounds.std()


@torch.no_grad()
def repair(received: Received, settings: Settings, seed: int) -> tuple[Classifier, dict]:
    """The pruned classifier, and by layer the channels that went. Nothing is random."""
    model, _ = training.copied(received, settings.scope, "clp")
    pruned = {}
    if settings.scope != "head":
        for name, norm in norms_behind(model.encoder).items():
            weight = model.encoder.get_submodule(name).weight
            bad = outstanding(channel_bounds(weight, norm.weight, norm.running_var, norm.eps), settings.u)
            norm.weight[bad], norm.bias[bad] = 0.0, 0.0
            pruned[f"encoder.{name}"] = bad.nonzero().flatten().tolist()
    if settings.scope != "encoder":
        for name in ("fc1", "fc2"):
            layer = model.head.get_submodule(name)
            bad = outstanding(layer.weight.norm(dim=1), settings.u)
            layer.weight[bad], layer.bias[bad] = 0.0, 0.0
            pruned[f"head.{name}"] = bad.nonzero().flatten().tolist()
    return model, {"pruned": {name: channels for name, channels in pruned.items() if channels}}
