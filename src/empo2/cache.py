"""Where what is fetched or made once is kept: models, the fastest precision, indexed catalogues."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """``$EMPO2_CACHE``, or ``empo2`` in the user's cache folder."""
    if chosen := os.environ.get("EMPO2_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "empo2"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache, filled by ``make`` if it is not there yet: whole or not at all."""
    target = cache_folder() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            made.mkdir()
            make(made)
            try:
                made.rename(target)
            except OSError:
                if not target.exists():  # else another process was faster, and made the same
                    raise
    return target
