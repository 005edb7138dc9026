"""The indexed catalogue on disk: made once for a folder of official files, then mapped, so that a start takes no time.

Its folder in the cache is named after the files' names, sizes and times of change.
"""

import hashlib
import json
import mmap
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empo2.cache import made_once
from empo2.envs.webshop.catalogue import Indexed, Indexing, Listing
from empo2.envs.webshop.products import Product, official_files, read_products
from empo2.envs.webshop.search import SearchIndex
from empo2.errors import UsageError

FORMAT = 2  #: of the cache; raise it when what is kept changes
REMEMBERED = 4096  #: products that are not read twice


@dataclass(frozen=True)
class About:
    """What a result is told apart by."""

    num_products: int
    checksum: str  #: sha256 of the products file and the instructions


def kept(folder: Path, *, limit: int | None = None) -> tuple[Indexed, About]:
    """The indexed catalogue of ``folder``, made the first time. ``limit``: see `read_products`.

    Raises UsageError for files that are missing or malformed.
    """
    files = official_files(folder)
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(repr((FORMAT, stats, limit)).encode()).hexdigest()[:16]
    return _read(made_once(f"webshop/{name}", lambda target: _write(folder, files, target, limit)))


def _write(folder: Path, files: Sequence[Path], target: Path, limit: int | None) -> None:
    indexing, offsets = Indexing(), [0]
    with (target / "products.bin").open("wb") as file:
        for product in read_products(folder, limit=limit):
            indexing.add(product)
            offsets.append(offsets[-1] + file.write(pickle.dumps(product, protocol=5)))
    if len(offsets) == 1:
        raise UsageError(f"{files[0]} holds no product")
    parts = indexing.done(())
    np.save(target / "offsets.npy", np.array(offsets, np.int64))
    for name, array in {**_arrays(parts.listing), **_arrays(parts.search)}.items():
        np.save(target / f"{name}.npy", array)
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    words = {
        "num_products": len(offsets) - 1,
        "checksum": total.hexdigest(),
        "vocabulary": list(parts.search.vocabulary),
        "by_query": parts.by_query,
        "by_category": parts.by_category,
    }
    (target / "words.json").write_text(json.dumps(words), encoding="utf-8")


def _read(target: Path) -> tuple[Indexed, About]:
    words = json.loads((target / "words.json").read_text(encoding="utf-8"))

    def array(name: str) -> Any:
        return np.load(target / f"{name}.npy", mmap_mode="r")

    products = KeptProducts(target / "products.bin", array("offsets"))
    listing = Listing(**{each.name: array(each.name) for each in fields(Listing)})
    search = SearchIndex(
        vocabulary={term: number for number, term in enumerate(words["vocabulary"])},
        starts=array("starts"),
        places=array("places"),
        scores=array("scores"),
        num_products=words["num_products"],
    )
    parts = Indexed(products, listing, search, words["by_query"], words["by_category"])
    return parts, About(words["num_products"], words["checksum"])


def _arrays(holder: object) -> dict[str, NDArray[np.generic]]:
    found = ((each.name, getattr(holder, each.name)) for each in fields(holder))  # type: ignore[arg-type]
    return {name: value for name, value in found if isinstance(value, np.ndarray)}


class KeptProducts(Sequence[Product]):
    """Products read from the mapped file when they are looked at."""

    def __init__(self, path: Path, offsets: NDArray[np.int64]) -> None:
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = offsets
        self._at = lru_cache(maxsize=REMEMBERED)(self._unpickled)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, place: int) -> Product:  # type: ignore[override]
        return self._at(int(place))

    def _unpickled(self, place: int) -> Product:
        if not 0 <= place < len(self):
            raise IndexError(place)
        product: Product = pickle.loads(self._bytes[self._offsets[place] : self._offsets[place + 1]])
        return product
