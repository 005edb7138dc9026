"""TipMemory: what is found, what is evicted, and that any earlier step comes back exactly."""

import math
import sqlite3
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from empo2.memory import NewTip, TipMemory, scope_of
from empo2.store import open_store
from empo2.types import EpisodeKey, Task

# Vectors of sixteen times +-1/4 have length 1 and cosines that are exact multiples of 1/8, in float32 as in float64:
# entries tie, and lie on the threshold, without rounding.
KEYS = st.lists(st.sampled_from([-0.25, 0.25]), min_size=16, max_size=16).map(tuple)


def tip(key, text: str = "tip", *, score: float = 0.0, source: int = 0, scope: str = "s", turn: int = 0) -> NewTip:
    return NewTip(
        scope=scope,
        key=np.array(key, np.float32),
        state="state",
        text=text,
        score=score,
        source=EpisodeKey(1, 0, source),
        turn=turn,
    )


def memory(tips=(), *, step: int = 1, path="", **options) -> TipMemory:
    made = TipMemory(open_store(path or ":memory:"), **options)
    made.commit(step, tips)
    return made


def texts(found: TipMemory, key, scope: str = "s") -> list[str]:
    return [shown.text for shown in found.retrieve(scope, np.array(key, np.float32)).tips]


def entry(stored: NewTip, born: int) -> oracles.Entry:
    return {
        "key": stored.key.tolist(),
        "text": stored.text,
        "score": stored.score,
        "source": stored.source.episode,
        "born": born,
    }


@st.composite
def many_tips(draw, scopes: tuple[str, ...] = ("s",)) -> list[NewTip]:
    """Few keys, texts, scores and sources, so that all of them repeat."""
    keys = draw(st.lists(KEYS, min_size=1, max_size=4))
    rows = st.tuples(
        st.sampled_from(keys), st.sampled_from("abcdef"), st.integers(0, 3), st.integers(0, 5), st.sampled_from(scopes)
    )
    return [
        tip(key, text, score=10.0 * score, source=source, scope=scope)
        for key, text, score, source, scope in draw(st.lists(rows, max_size=25))
    ]


# ---------------------------------------------------------------- retrieval


@settings(deadline=None, max_examples=100)
@given(
    many_tips(),
    st.lists(KEYS, min_size=1, max_size=4),
    st.sampled_from(["score", "similarity"]),
    st.sampled_from([-0.5, 0.0, 0.125, 0.5]),
    st.integers(1, 6),
    st.sampled_from([None, 10.0, 20.0]),
)
def test_retrieval_equals_the_oracles(tips, queries, rank, threshold, k, min_score):
    found = memory(tips, rank=rank, threshold=threshold, k=k, min_score=min_score)
    entries = [entry(stored, born) for born, stored in enumerate(tips)]
    allowed = [e for e in entries if min_score is None or e["score"] >= min_score]
    for query in queries + [tuple(stored.key.tolist()) for stored in tips[:2]]:
        expected = oracles.retrieve(allowed, query, threshold=threshold, k=k, rank=rank)
        assert texts(found, query) == expected
        result = found.retrieve("s", np.array(query, np.float32))
        assert result.entries == len(entries)
        assert result.candidates == sum(oracles.cosine(e["key"], query) > threshold for e in entries)


@pytest.mark.parametrize("rank", ["score", "similarity"])
def test_retrieval_equals_the_oracles_on_embeddings_of_real_size(rank):
    """Keys repeat, as the first state of every episode does: equal keys must tie wherever they stand."""
    generator = np.random.default_rng(0)
    rooms = generator.normal(size=(20, 384)) + 1.2 * generator.normal(size=384)
    rooms = (rooms / np.linalg.norm(rooms, axis=1, keepdims=True)).astype(np.float32)
    tips = [
        tip(rooms[generator.integers(20)], f"tip {index % 70}", score=float(generator.integers(4)), source=index % 60)
        for index in range(150)
    ]
    found = memory(tips, rank=rank, threshold=0.5, k=10)
    entries = [entry(stored, born) for born, stored in enumerate(tips)]
    for room in rooms:
        assert texts(found, room) == oracles.retrieve(entries, room.tolist(), threshold=0.5, k=10, rank=rank)


@pytest.mark.parametrize("rank", ["score", "similarity"])
def test_equal_keys_tie_and_the_most_recent_is_first(rank):
    key = np.random.default_rng(1).normal(size=(2, 384)).astype(np.float32)
    key /= np.linalg.norm(key, axis=1, keepdims=True)
    for count in range(1, 40):
        tips = [tip(key[0], f"tip {index}", source=index) for index in range(count)]
        found = memory(tips, rank=rank, threshold=-1.0, k=100)
        assert texts(found, key[1]) == [f"tip {index}" for index in reversed(range(count))]


def test_a_cosine_equal_to_the_threshold_is_no_candidate():
    at, above = (0.5, math.sqrt(0.75)), (0.51, math.sqrt(1 - 0.51**2))
    found = memory([tip(at, "at", source=1), tip(above, "above", source=2)], threshold=0.5)
    result = found.retrieve("s", np.array((1.0, 0.0), np.float32))
    assert [shown.text for shown in result.tips] == ["above"]
    assert (result.candidates, result.entries) == (1, 2)


def test_what_is_passed_over_uses_up_no_place():
    """Ranked: a (source 1), b (source 1: passed over), a (text passed over), c."""
    tips = [
        tip((1, 0), "c", score=1, source=3),
        tip((1, 0), "a", score=2, source=2),
        tip((1, 0), "b", score=3, source=1),
        tip((1, 0), "a", score=4, source=1),
    ]
    assert texts(memory(tips, k=2), (1, 0)) == ["a", "c"]


def test_a_retrieved_tip_says_where_it_comes_from():
    found = memory([tip((0.6, 0.8), "up", score=40.0, source=7)])
    (shown,) = found.retrieve("s", np.array((1.0, 0.0), np.float32)).tips
    assert (shown.text, shown.score, shown.source) == ("up", 40.0, EpisodeKey(1, 0, 7))
    assert shown.similarity == pytest.approx(0.6, abs=1e-7)


def test_entries_below_the_lowest_score_are_passed_over_but_counted():
    """`candidates` says how much the threshold lets through; a low score is no matter of similarity."""
    found = memory([tip((1, 0), "bad", score=-100, source=1), tip((1, 0), "even", score=0, source=2)], min_score=0.0)
    result = found.retrieve("s", np.array((1.0, 0.0), np.float32))
    assert [shown.text for shown in result.tips] == ["even"]
    assert (result.candidates, result.entries) == (2, 2)


def test_an_empty_memory_finds_nothing():
    result = memory().retrieve("s", np.array((1.0, 0.0), np.float32))
    assert (result.tips, result.candidates, result.entries) == ((), 0, 0)


# ---------------------------------------------------------------- scopes


def test_scopes_do_not_see_each_other():
    found = memory([tip((1, 0), "a", scope="one"), tip((1, 0), "b", scope="two"), tip((1, 0), "c", scope="two")])
    assert texts(found, (1, 0), "one") == ["a"]
    assert texts(found, (1, 0), "two") == ["c"]  # b and c have one source
    assert texts(found, (1, 0), "three") == []
    assert [found.size("one"), found.size("two"), found.size("three"), found.size()] == [1, 2, 0, 3]


def test_in_place_of_each_own_entry_one_of_another_scope():
    key, far = np.eye(2, dtype=np.float32)
    own = [tip(key, f"own {n}", source=n, score=1.0) for n in range(3)] + [tip(far, "own far", source=9, score=1.0)]
    others = [tip(far, f"other {n}", source=20 + n, scope="o", score=float(n > 0)) for n in range(3)]
    found = memory([*own, *others], k=2, min_score=0.5)

    def instead(query, scope: str = "o") -> list[str]:
        return [shown.text for shown in found.retrieve("s", query, instead=scope).tips]

    assert texts(found, key) == ["own 2", "own 1"]
    assert instead(key) == ["other 1", "other 2"], "places 2 and 1 of two entries that may be shown, counted round"
    assert texts(found, far) == ["own far"]
    assert instead(far) == ["other 2"], "place 3: as many as its own, whatever their states"
    assert instead(-key) == [], "none where it has none of its own"
    assert instead(key, "nothing") == [], "none while the other has none"
    assert (found.retrieve("s", key, instead="o").candidates, found.retrieve("s", key, instead="o").entries) == (3, 4)
    found.commit(2, [tip(key, "own 4", source=4, score=1.0), tip(key, "own 5", source=5, score=1.0)])
    assert texts(found, key) == ["own 5", "own 4"]
    assert instead(key) == ["other 2", "other 1"], "places 5 and 4"
    few = memory([tip(key, "a", source=1), tip(key, "b", source=2), tip(far, "c", scope="o")], k=2)
    assert [shown.text for shown in few.retrieve("s", key, instead="o").tips] == ["c"], "no entry twice"
    three = memory(
        [*(tip(key, f"{n}", source=n) for n in range(4)), tip(far, "a", scope="o"), tip(far, "b", scope="o")]
    )
    assert [shown.text for shown in three.retrieve("s", key, instead="o").tips] == ["b", "a"], "taken ones are passed"


def test_what_a_scope_holds():
    tasks = [
        Task(environment=environment, name=name, variation=variation)
        for environment in ("lab", "toy")
        for name in ("boil", "find")
        for variation in (1, 11)
    ]
    assert len({scope_of(task, "variation") for task in tasks}) == 8
    assert len({scope_of(task, "name") for task in tasks}) == 4
    assert len({scope_of(task, "all") for task in tasks}) == 2
    assert scope_of(tasks[0], "variation") == "lab/boil/1"


# ---------------------------------------------------------------- commit and eviction


@settings(deadline=None, max_examples=50)
@given(many_tips(scopes=("s", "t")), st.integers(1, 8), st.integers(1, 4), KEYS)
def test_eviction_equals_the_oracles_in_every_scope(tips, max_entries, steps, query):
    """However the tips fall into steps."""
    found = memory(max_entries=max_entries, threshold=-1.0, k=100)
    for step in range(steps):
        found.commit(step + 1, tips[step * len(tips) // steps : (step + 1) * len(tips) // steps])
    for scope in ("s", "t"):
        entries = [entry(stored, born) for born, stored in enumerate(tips) if stored.scope == scope]
        kept = oracles.evict(entries, max_entries)
        assert found.size(scope) == len(kept)
        assert texts(found, query, scope) == oracles.retrieve(kept, query, threshold=-1.0, k=100)


def test_within_a_step_the_last_given_is_the_most_recent():
    tips = [tip((1, 0), name, source=index) for index, name in enumerate("abc")]
    assert texts(memory(tips), (1, 0)) == ["c", "b", "a"]
    assert texts(memory(tips[::-1]), (1, 0)) == ["a", "b", "c"]
    assert texts(memory(tips, max_entries=2), (1, 0)) == ["c", "b"]


def test_a_commit_is_seen_by_the_next_retrieval():
    found = memory([tip((1, 0), "a", source=1)])
    assert texts(found, (1, 0)) == ["a"]
    found.commit(2, [tip((1, 0), "b", source=2)])
    assert texts(found, (1, 0)) == ["b", "a"]


def test_a_commit_that_fails_stores_nothing():
    found = memory([tip((1, 0), "a", source=1)])
    before = found.digest()
    with pytest.raises(sqlite3.IntegrityError):
        found.commit(2, [tip((1, 0), "b", source=2), replace(tip((1, 0), source=3), text=None)])
    assert (found.digest(), texts(found, (1, 0))) == (before, ["a"])


def test_the_digest_is_that_of_all_that_retrieval_depends_on():
    base = [tip((1, 0), "a", score=1.0, source=1), tip((0, 1), "b", score=2.0, source=2)]
    others = [
        base[::-1],
        base[:1],
        [base[0], tip((0, 1), "B", score=2.0, source=2)],
        [base[0], tip((0, 1), "b", score=3.0, source=2)],
        [base[0], tip((0, 1), "b", score=2.0, source=1)],
        [base[0], tip((1, 0), "b", score=2.0, source=2)],
        [base[0], tip((0, 1), "b", score=2.0, source=2, scope="t")],
    ]
    digests = [memory(tips).digest() for tips in (base, *others)]
    assert len(set(digests)) == len(digests)
    assert memory(base).digest() == digests[0]


# ---------------------------------------------------------------- earlier steps


def history(seed: int, steps: int = 12) -> list[list[NewTip]]:
    """Tips of several steps in two scopes; some steps write none, some more than a scope holds."""
    generator = np.random.default_rng(seed)
    made = []
    for step in range(steps):
        made.append(
            [
                tip(
                    generator.choice([-0.25, 0.25], size=16),
                    f"tip {step} {index}",
                    score=float(generator.integers(4)),
                    source=int(generator.integers(5)),
                    scope=str(generator.choice(["s", "t"])),
                )
                for index in range(generator.choice([0, 1, 3, 12]))
            ]
        )
    return made


def commit_all(found: TipMemory, steps: list[list[NewTip]], first: int = 1) -> list[str]:
    """Commit steps `first`, `first` + 1, …; the digest after each."""
    digests = []
    for step, tips in enumerate(steps, start=first):
        found.commit(step, tips)
        digests.append(found.digest())
    return digests


def copy_of(connection: sqlite3.Connection) -> sqlite3.Connection:
    copy = open_store(":memory:")
    connection.backup(copy)
    return copy


@pytest.mark.parametrize("seed", range(4))
def test_rewind_brings_back_exactly_what_was_there_after_any_step(seed):
    """Also entries that later steps evicted; and from there the run goes on as it did the first time."""
    steps = history(seed)
    assert sum(len(tips) for tips in steps) > 20  # of which two scopes keep 12
    connection = open_store(":memory:")
    found = TipMemory(connection, max_entries=6)
    digests = [found.digest(), *commit_all(found, steps)]
    query = np.full(16, 0.25, np.float32)
    for step in range(len(steps) + 1):
        fresh = TipMemory(open_store(":memory:"), max_entries=6, threshold=-1.0)
        commit_all(fresh, steps[:step])
        found = TipMemory(copy_of(connection), max_entries=6, threshold=-1.0)
        found.retrieve("s", query)  # what was read before must not be remembered
        found.rewind(step)
        assert found.digest() == digests[step] == fresh.digest()
        assert [found.retrieve(scope, query) for scope in "st"] == [fresh.retrieve(scope, query) for scope in "st"]
        assert commit_all(found, steps[step:], first=step + 1) == digests[step + 1 :]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("oldest", [1, 5, 9, 12])
def test_prune_breaks_no_rewind_to_a_step_that_is_kept(seed, oldest):
    steps = history(seed)
    connection = open_store(":memory:")
    found = TipMemory(connection, max_entries=6)
    digests = [found.digest(), *commit_all(found, steps)]
    found.prune(oldest)
    assert found.digest() == digests[-1]
    for step in range(oldest, len(steps) + 1):
        again = TipMemory(copy_of(connection), max_entries=6)
        again.rewind(step)
        assert again.digest() == digests[step]
        assert commit_all(again, steps[step:], first=step + 1) == digests[step + 1 :]


def test_prune_after_every_step_keeps_the_file_small():
    connection = open_store(":memory:")
    found = TipMemory(connection, max_entries=3)
    for step in range(1, 50):
        found.commit(step, [tip((1, 0), f"{step} {index}") for index in range(2)])
        found.prune(step - 1)
        assert connection.execute("SELECT COUNT(*) FROM tips").fetchone()[0] <= 3 + 2


def test_steps_that_are_written_again_do_not_leave_the_first_ones():
    """A run that was killed after step 3, with its last checkpoint at step 1."""
    found = memory([tip((1, 0), "one", source=1)], step=1)
    found.commit(2, [tip((1, 0), "two", source=2)])
    found.commit(3, [tip((1, 0), "three", source=3)])
    found.rewind(1)
    found.commit(2, [tip((1, 0), "second two", source=2)])
    assert texts(found, (1, 0)) == ["second two", "one"]


def test_entries_outlive_the_process(tmp_path: Path):
    path = tmp_path / "store.sqlite"
    steps = history(0)
    first = memory(step=0, path=path, max_entries=6, threshold=-1.0)
    commit_all(first, steps)
    again = TipMemory(open_store(path), max_entries=6, threshold=-1.0)
    query = np.full(16, 0.25, np.float32)
    assert (again.digest(), again.size()) == (first.digest(), first.size())
    assert again.retrieve("s", query) == first.retrieve("s", query)
    assert again.retrieve("s", query).tips


def test_a_key_comes_back_bit_for_bit(tmp_path: Path):
    key = np.random.default_rng(0).normal(size=384).astype(np.float32)
    key /= np.linalg.norm(key)
    path = tmp_path / "store.sqlite"
    memory([tip(key)], path=path)
    ((blob,),) = open_store(path).execute("SELECT key FROM tips").fetchall()
    assert np.frombuffer(blob, "<f4").tolist() == key.tolist()


def test_digests_of_a_history_differ_step_by_step():
    """The tests above compare something."""
    steps = [tips or [tip((0.25,) * 16)] for tips in history(0)]
    assert all(a != b for a, b in pairwise(commit_all(memory(step=0, max_entries=6), steps)))
