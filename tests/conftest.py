"""What many tests share: a tiny model, its tokenizer and chat format."""

import pytest
import torch

from empo2 import models
from empo2.chat import ChatFormat

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return models.tiny_tokenizer()


@pytest.fixture(scope="session")
def chat(tokenizer):
    return ChatFormat.of(tokenizer)


@pytest.fixture
def make_model():
    """A fresh tiny model with the project's attention."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32):
        return models.load_model(models.TINY, dtype=dtype, device="cpu", seed=seed)

    return make
