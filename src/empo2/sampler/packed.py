"""Linear layers whose weights lie as oneDNN multiplies them fastest: sampling reads all of them for every token.

The ordinary product takes a weight apart anew in each call. For the few rows of a decoding step that costs more than
the product itself (docs/performance.md); a sampling copy is not trained, so it is done once, when weights arrive.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """x [1, N, in] → [1, N, out], as nn.Linear, without gradients. Holds nothing but the packed weight and the bias."""

    def __init__(self, linear: nn.Linear, source: str) -> None:
        super().__init__()
        self.source = source  #: the weight's name in the model
        self.bias = linear.bias
        self._dtype = linear.weight.dtype
        self.pack(linear.weight)

    def pack(self, weight: Tensor) -> None:
        """Take over a weight [out, in] of any precision."""
        self._weight = _pack(weight.detach().to(self._dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return _multiply(hidden, self._weight, self.bias)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _multiply(hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
    return out


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor and this torch have packed products of a precision: found by trying one."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    ones = torch.ones(16, 16, dtype=dtype)
    try:
        return torch.equal(_multiply(ones[None], _pack(ones), None), 16 * ones[None])
    except (RuntimeError, AttributeError):  # no such instructions, or no such operation
        return False


def pack_linears(model: nn.Module) -> list[PackedLinear]:
    """Replace every linear layer of ``model``; those that were made. A tied embedding stays beside its packed copy."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    packed = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                packed.append(PackedLinear(child, names[id(child.weight)]))
                setattr(module, name, packed[-1])
    return packed


def load_packed(packed: list[PackedLinear], weights: Mapping[str, Any]) -> None:
    for layer in packed:
        layer.pack(weights[layer.source])
