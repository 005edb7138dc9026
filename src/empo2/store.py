"""What `TipMemory` and `NoveltyCounter` share: the SQLite file, and how embeddings are compared.

Rows are never changed in place: they are born at a step and may be evicted at a later one, so any earlier step that a
checkpoint still needs can be brought back exactly.
"""

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from empo2.errors import CheckpointError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tips (
    id INTEGER PRIMARY KEY, scope TEXT NOT NULL, key BLOB NOT NULL, state TEXT NOT NULL, text TEXT NOT NULL,
    score REAL NOT NULL, source_step INTEGER NOT NULL, source_group INTEGER NOT NULL, source_episode INTEGER NOT NULL,
    turn INTEGER NOT NULL, born_step INTEGER NOT NULL, evicted_step INTEGER);
CREATE TABLE IF NOT EXISTS states (
    id INTEGER PRIMARY KEY, scope TEXT NOT NULL, key BLOB NOT NULL, text TEXT NOT NULL, born_step INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS visits (
    state INTEGER NOT NULL, step INTEGER NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (state, step));
"""


def open_store(path: Path | str) -> sqlite3.Connection:
    """Open or create the file; ``":memory:"``: a store that is thrown away. Raises CheckpointError if it is damaged."""
    connection = sqlite3.connect(str(path))
    try:
        connection.executescript(_SCHEMA)
    except sqlite3.DatabaseError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    return connection


def copy_into(connection: sqlite3.Connection, path: Path) -> None:
    """Fill an empty store with what a file holds, leaving the file alone. Raises CheckpointError for a damaged file."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as source:
            source.backup(connection)
    except sqlite3.DatabaseError as error:
        raise CheckpointError(f"{path} is missing or damaged ({error})") from None


def digest(rows: Iterable[tuple[Any, ...]]) -> str:
    """sha256 over rows, in their order."""
    sha = hashlib.sha256()
    for row in rows:
        sha.update(repr(row).encode())
    return sha.hexdigest()


def cosines(keys: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each unit vector with another, [N, D] and [D] → [N].

    One dot product a row: a matrix product (``keys @ query``) rounds a row by its place among the others, so that equal
    keys would not tie.
    """
    similarities: NDArray[np.float32] = np.vecdot(keys, query)
    return similarities
