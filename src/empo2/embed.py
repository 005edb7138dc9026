"""Sentence embedders: texts → unit vectors. A text's vector depends on that text alone, never on its batch."""

import hashlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from empo2.types import Embedder

Vectors = NDArray[np.float32]


class CachedEmbedder:
    """Remembers the latest vectors: states repeat a lot within and across episodes."""

    def __init__(self, embedder: Embedder, max_texts: int = 50_000) -> None:
        self.dimension = embedder.dimension
        self._embedder = embedder
        self._max_texts = max_texts
        self._vectors: OrderedDict[str, Vectors] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Texts [N] → unit vectors [N, D], float32."""
        missing = list(OrderedDict.fromkeys(text for text in texts if text not in self._vectors))
        if missing:
            self._vectors.update(zip(missing, self._embedder.embed(missing), strict=True))
        rows = [self._vectors[text] for text in texts]
        while len(self._vectors) > self._max_texts:
            self._vectors.popitem(last=False)
        return np.stack(rows) if rows else np.zeros((0, self.dimension), np.float32)


class HashingEmbedder:
    """Words and word pairs hashed to signed coordinates: no model, instant, for tests and toy environments."""

    def __init__(self, dimension: int = 256) -> None:
        self.dimension = dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> Vectors:
        words = re.findall(r"\w+", text.lower())
        vector = np.zeros(self.dimension, np.float32)
        for feature in [*words, *map(" ".join, itertools.pairwise(words))]:
            digest = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "big")
            vector[digest % self.dimension] += 1 if digest >> 63 else -1
        norm = float(np.linalg.norm(vector))
        if norm == 0:
            vector[0] = norm = 1.0
        return vector / np.float32(norm)


class SentenceEmbedder:
    """A sentence-transformers model run with plain transformers: mean over tokens, then normalised (all-MiniLM-L6-v2).

    Reads the first 256 word pieces, as the model was trained. One text at a time: padding a batch would change the last
    bits of a vector, and with them a resumed run.
    """

    def __init__(self, folder: str, *, device: str = "cpu", max_tokens: int = 256) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder).to(device).float().eval()
        self._max_tokens = max_tokens
        self.dimension = int(self._model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._one(text) for text in texts])

    def _one(self, text: str) -> Vectors:
        import torch

        encoded = self._tokenizer(text, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(**encoded.to(self._model.device)).last_hidden_state
        mean = hidden[0].float().mean(0)
        vector: Vectors = torch.nn.functional.normalize(mean, dim=0).cpu().numpy()
        return vector
