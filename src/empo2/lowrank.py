"""A trained model as its difference from the one it began with: a few megabytes that can be passed on.

Of every matrix that changed the `rank` largest singular directions of the change are kept (what LoRA calls A and B,
Hu et al. 2021), vectors whole. Whoever has the first model makes the second from it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def difference(before: State, after: State, rank: int) -> dict[str, Tensor]:
    """What to add to ``before`` to come close to ``after``, two state dicts of equal shapes.

    A matrix W [m, n] that changed gives `W.B` [m, r] and `W.A` [r, n] in bfloat16, r = min(rank, m, n); anything else
    that changed gives its change in float32 under its own name.
    """
    found: dict[str, Tensor] = {}
    for name, old in before.items():
        change = after[name].detach().double() - old.detach().double()
        if not change.any():
            continue
        if change.ndim != 2:
            found[name] = change.float()
            continue
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        root = values[:rank].sqrt()
        found[f"{name}.B"] = (left[:, :rank] * root).bfloat16().contiguous()
        found[f"{name}.A"] = (root[:, None] * right[:rank]).bfloat16().contiguous()
    return found


def added(before: State, difference: State) -> dict[str, Tensor]:
    """The state dict ``before`` with a difference added, in its own dtypes; tensors without a change are those of
    ``before``. Raises KeyError for a difference of another model.
    """
    made = dict(before)
    for name, tensor in difference.items():
        if name.endswith(".B"):
            key = name.removesuffix(".B")
            change = tensor.double() @ difference[f"{key}.A"].double()
        elif name.endswith(".A"):
            continue
        else:
            key, change = name, tensor.double()
        made[key] = (before[key].double() + change).to(before[key].dtype)
    return made
