"""TipMemory: what the agent told itself, found again by the state it was in.

Reads see the memory as it was when the step began; `commit` is the only way in. Rows: store.py.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from empo2 import store
from empo2.types import EpisodeKey, Task, Tip

Scope = Literal["variation", "name", "all"]


def scope_of(task: Task, scope: Scope) -> str:
    """Name of the set of tasks that share entries with this one."""
    return {"variation": str(task), "name": f"{task.environment}/{task.name}", "all": task.environment}[scope]


@dataclass(frozen=True, kw_only=True)
class NewTip:
    """An entry to be stored."""

    scope: str
    key: NDArray[np.float32]  #: embedding of the state, [D]
    state: str  #: its text, for readers of the file
    text: str
    score: float
    source: EpisodeKey
    turn: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """What one query found."""

    tips: tuple[Tip, ...]  #: best first
    candidates: int  #: entries over the threshold
    entries: int  #: entries in the scope


@dataclass(frozen=True)
class _Scope:
    """The living entries of one scope, oldest first."""

    ids: list[int]
    keys: NDArray[np.float32]  # [N, D]
    tips: list[Tip]  # similarity 0


class TipMemory:
    """Stores tips and retrieves them (EMPO² section 4.1; docs/algorithm.md section 2).

    ``threshold``: cosine above which an entry is a candidate; ``k``: entries per query; ``rank``: by final score or by
    similarity; ``max_entries`` per scope, the oldest are evicted; ``min_score``: lower-scored entries are passed over.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        threshold: float = 0.5,
        k: int = 10,
        rank: Literal["score", "similarity"] = "score",
        max_entries: int = 1000,
        min_score: float | None = None,
    ) -> None:
        self._db = connection
        self._threshold, self._k, self._rank = threshold, k, rank
        self._max_entries, self._min_score = max_entries, min_score
        self._scopes: dict[str, _Scope] = {}

    def retrieve(self, scope: str, query: NDArray[np.float32], *, instead: str | None = None) -> Retrieval:
        """The best entries for a state embedding [D].

        Candidates have cosine > threshold. They are ranked by score (or similarity), ties by most recent, and taken
        from the top until there are k, passing over a source episode or a text that was taken already.

        ``instead``: a scope whose entries are given in their place, one for each, whatever their states (a control);
        none while it has none.
        """
        entries = self._load(scope)
        if not entries.ids:
            return Retrieval(tips=(), candidates=0, entries=0)
        similarities = store.cosines(entries.keys, query)
        candidates = np.flatnonzero(similarities > self._threshold)
        found = [
            (int(index), float(similarities[index])) for index in candidates if self._may_be_shown(entries.tips[index])
        ]
        by_score = self._rank == "score"
        found.sort(key=lambda hit: (entries.tips[hit[0]].score if by_score else hit[1], hit[0]), reverse=True)
        taken: list[Tip] = []
        places: list[int] = []
        for index, similarity in found:
            tip = entries.tips[index]
            if len(taken) == self._k:
                break
            if all(tip.source != other.source and tip.text != other.text for other in taken):
                taken.append(replace(tip, similarity=similarity))
                places.append(index)
        if instead is not None:
            taken = self._replaced(places, instead)
        return Retrieval(tips=tuple(taken), candidates=len(candidates), entries=len(entries.ids))

    def _may_be_shown(self, tip: Tip) -> bool:
        return self._min_score is None or tip.score >= self._min_score

    def _replaced(self, places: Sequence[int], scope: str) -> list[Tip]:
        """For each place (oldest entry: 0) another scope's entry at that place, modulo their number.

        An entry that is taken already is replaced by the next one that is not.
        """
        others = [tip for tip in self._load(scope).tips if self._may_be_shown(tip)]
        chosen: list[int] = []
        for place in places[: len(others)]:
            while place % len(others) in chosen:
                place += 1
            chosen.append(place % len(others))
        return [others[index] for index in chosen]

    def commit(self, step: int, tips: Sequence[NewTip]) -> None:
        """Store what a step wrote, in the given order, and evict the oldest entries over the limit."""
        with self._db:
            self._db.executemany(
                "INSERT INTO tips (scope, key, state, text, score, source_step, source_group, source_episode, turn,"
                " born_step) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (t.scope, t.key.astype("<f4").tobytes(), t.state, t.text, t.score, *t.source, t.turn, step)
                    for t in tips
                ],
            )
            for scope in dict.fromkeys(t.scope for t in tips):
                self._db.execute(
                    "UPDATE tips SET evicted_step = ? WHERE id IN (SELECT id FROM tips WHERE scope = ? AND"
                    " evicted_step IS NULL ORDER BY id DESC LIMIT -1 OFFSET ?)",
                    (step, scope, self._max_entries),
                )
                self._scopes.pop(scope, None)

    def size(self, scope: str | None = None) -> int:
        """Number of living entries, in one scope or in all."""
        condition, arguments = ("", ()) if scope is None else (" AND scope = ?", (scope,))
        query = f"SELECT COUNT(*) FROM tips WHERE evicted_step IS NULL{condition}"
        return int(self._db.execute(query, arguments).fetchone()[0])

    def rewind(self, step: int) -> None:
        """Back to the state right after ``step`` was committed."""
        with self._db:
            self._db.execute("DELETE FROM tips WHERE born_step > ?", (step,))
            self._db.execute("UPDATE tips SET evicted_step = NULL WHERE evicted_step > ?", (step,))
        self._scopes.clear()

    def prune(self, oldest_step: int) -> None:
        """Delete rows that no checkpoint from ``oldest_step`` on needs."""
        with self._db:
            self._db.execute("DELETE FROM tips WHERE evicted_step <= ?", (oldest_step,))

    def digest(self) -> str:
        """sha256 of the living entries."""
        return store.digest(
            self._db.execute(
                "SELECT scope, key, text, score, source_step, source_group, source_episode, turn, born_step FROM tips"
                " WHERE evicted_step IS NULL ORDER BY id"
            )
        )

    def _load(self, scope: str) -> _Scope:
        if scope not in self._scopes:
            rows = self._db.execute(
                "SELECT id, key, text, score, source_step, source_group, source_episode FROM tips"
                " WHERE scope = ? AND evicted_step IS NULL ORDER BY id",
                (scope,),
            ).fetchall()
            self._scopes[scope] = _Scope(
                ids=[row[0] for row in rows],
                keys=np.stack([np.frombuffer(row[1], "<f4") for row in rows]) if rows else np.zeros((0, 0), np.float32),
                tips=[Tip(text=r[2], score=r[3], similarity=0.0, source=EpisodeKey(*r[4:7])) for r in rows],
            )
        return self._scopes[scope]
