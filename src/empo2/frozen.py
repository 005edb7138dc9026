"""Layers that no update changes: what they make of a step's tokens is computed once.

A step looks at each sequence several times: for its behavior log-probs, for those of the reference policy, and in its
update. Where only the last layers are trained, those below give the same hidden states every time, in the policy and in
the reference.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from empo2.sequences import Pack
from empo2.types import TokenIds


class FrozenLayers:
    """Hidden states above the frozen layers of ``model``, by the token ids of the sequences seen by `compute`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hidden: list[Tensor] = []  # of each pack, [tokens, width]
        self._rows: dict[TokenIds, Tensor] = {}  # of each sequence: rows of all packs' hidden states, [tokens]

    @cached_property
    def layers(self) -> Sequence[Any]:
        """The first layers, as long as neither they nor the embeddings below them are trained."""
        decoder = self._model.get_decoder()
        if any(parameter.requires_grad for parameter in decoder.get_input_embeddings().parameters()):
            return []
        trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in decoder.layers]
        return decoder.layers[: [*trained, True].index(True)]

    def forget(self) -> None:
        self._hidden, self._rows = [], {}

    def compute(self, packed: Pack, **inputs: Any) -> None:
        """Run the frozen layers alone over a pack; ``inputs``: the decoder's."""
        found: list[Tensor] = []

        def keep(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(hidden[0])
            return hidden

        decoder = self._model.get_decoder()
        with replaced(decoder.layers[len(self.layers) :], keep):
            decoder(**inputs)
        before = sum(len(hidden) for hidden in self._hidden)
        self._hidden.append(found[0])
        for sequence, places in zip(packed.sequences, packed.places, strict=True):
            self._rows[sequence.token_ids] = torch.tensor(places) + before

    @contextmanager
    def given(self, model: Any, packed: Pack) -> Iterator[None]:
        """Within, ``model`` (the policy or the reference) starts above its frozen layers if all sequences are known."""
        if any(sequence.token_ids not in self._rows for sequence in packed.sequences):
            yield
            return
        rows = torch.empty(len(packed.token_ids), dtype=torch.long)
        for sequence, places in zip(packed.sequences, packed.places, strict=True):
            rows[torch.tensor(places)] = self._rows[sequence.token_ids]
        if len(self._hidden) > 1:
            self._hidden = [torch.cat(self._hidden)]
        hidden = self._hidden[0][None, rows.to(self._hidden[0].device)]

        def known(*_: Any, **__: Any) -> Tensor:
            return hidden

        with replaced(model.get_decoder().layers[: len(self.layers)], known):
            yield


@contextmanager
def replaced(modules: Sequence[Any], forward: Any) -> Iterator[None]:
    """Within, the modules compute ``forward``."""
    before = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own
