"""NoveltyCounter: how often each state was visited, and the intrinsic reward that follows.

Reads see the counts as they were when the step began; `commit` is the only way in. Rows: store.py.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from empo2 import store

_ROUNDING = 1e-6  #: equal states may come out at a cosine of 0.9999999


@dataclass
class _Scope:
    """The distinct states of one scope, oldest first."""

    ids: list[int]
    keys: NDArray[np.float32]  # [N, D]
    texts: dict[str, int]  # text -> index
    visits: list[int]


@dataclass(frozen=True, kw_only=True)
class Visited:
    """The states of one episode, in turn order, to be counted."""

    scope: str
    texts: Sequence[str]
    keys: NDArray[np.float32]  #: [T, D]


class NoveltyCounter:
    """r_intrinsic = coefficient / n over distinct states (EMPO² section 4.3; docs/algorithm.md section 3).

    Two states are the same if their cosine is at least ``threshold`` (``kind="embedding"``) or their texts are equal
    (``kind="exact"``).
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        coefficient: float = 1.0,
        threshold: float = 0.9,
        kind: Literal["embedding", "exact"] = "embedding",
    ) -> None:
        self._db = connection
        self._coefficient, self._threshold, self._exact = coefficient, threshold, kind == "exact"
        self._scopes: dict[str, _Scope] = {}

    def rewards(self, visited: Visited) -> list[float]:
        """Intrinsic reward of each state of one episode, [T].

        n = 1 + visits of the same states when the step began + this episode's own earlier visits. Other episodes of
        the step do not count, so identical trajectories get identical rewards.
        """
        known = self._load(visited.scope)
        rewards = []
        for turn in range(len(visited.texts)):
            before = sum(known.visits[index] for index in self._same(known, visited, turn))
            own = self._own_earlier(visited, turn)
            rewards.append(self._coefficient / (1 + before + own))
        return rewards

    def commit(self, step: int, episodes: Sequence[Visited]) -> None:
        """Count the states of a step, one after another in the given order.

        A state that is the same as no entry becomes one; otherwise its most similar entry (the oldest of equals) gets
        the visit.
        """
        try:
            with self._db:
                for visited in episodes:
                    for turn in range(len(visited.texts)):
                        self._count(step, visited, turn)
        except BaseException:
            self._scopes.clear()  # the database took everything back
            raise

    def distinct_states(self) -> int:
        """Number of entries over all scopes."""
        return int(self._db.execute("SELECT COUNT(*) FROM states").fetchone()[0])

    def rewind(self, step: int) -> None:
        """Back to the state right after ``step`` was committed."""
        with self._db:
            self._db.execute("DELETE FROM states WHERE born_step > ?", (step,))
            self._db.execute("DELETE FROM visits WHERE step > ?", (step,))
        self._scopes.clear()

    def digest(self) -> str:
        """sha256 of the entries with their visits."""
        return store.digest(
            self._db.execute(
                "SELECT s.scope, s.key, s.text, s.born_step, SUM(v.count) FROM states s JOIN visits v ON v.state = s.id"
                " GROUP BY s.id ORDER BY s.id"
            )
        )

    def _same(self, known: _Scope, visited: Visited, turn: int) -> list[int]:
        if not known.ids:
            return []
        if self._exact:
            index = known.texts.get(visited.texts[turn])
            return [] if index is None else [index]
        similarities = store.cosines(known.keys, visited.keys[turn])
        return [int(i) for i in np.flatnonzero(similarities >= self._threshold - _ROUNDING)]

    def _own_earlier(self, visited: Visited, turn: int) -> int:
        if self._exact:
            return list(visited.texts[:turn]).count(visited.texts[turn])
        similarities = store.cosines(visited.keys[:turn], visited.keys[turn])
        return int(np.count_nonzero(similarities >= self._threshold - _ROUNDING))

    def _count(self, step: int, visited: Visited, turn: int) -> None:
        known = self._load(visited.scope)
        same = self._same(known, visited, turn)
        key, text = visited.keys[turn], visited.texts[turn]
        if same:
            index = same[int(np.argmax(store.cosines(known.keys[same], key)))]
            known.visits[index] += 1
        else:
            cursor = self._db.execute(
                "INSERT INTO states (scope, key, text, born_step) VALUES (?, ?, ?, ?)",
                (visited.scope, key.astype("<f4").tobytes(), text, step),
            )
            index = len(known.ids)
            known.ids.append(int(cursor.lastrowid or 0))
            known.keys = np.concatenate([known.keys.reshape(-1, len(key)), key[None]])
            known.texts.setdefault(text, index)
            known.visits.append(1)
        self._db.execute(
            "INSERT INTO visits (state, step, count) VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1",
            (known.ids[index], step),
        )

    def _load(self, scope: str) -> _Scope:
        if scope not in self._scopes:
            rows = self._db.execute(
                "SELECT s.id, s.key, s.text, SUM(v.count) FROM states s JOIN visits v ON v.state = s.id"
                " WHERE s.scope = ? GROUP BY s.id ORDER BY s.id",
                (scope,),
            ).fetchall()
            texts: dict[str, int] = {}
            for index, row in enumerate(rows):
                texts.setdefault(row[2], index)
            self._scopes[scope] = _Scope(
                ids=[row[0] for row in rows],
                keys=np.stack([np.frombuffer(row[1], "<f4") for row in rows]) if rows else np.zeros((0, 1), np.float32),
                texts=texts,
                visits=[row[3] for row in rows],
            )
        return self._scopes[scope]
