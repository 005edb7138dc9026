"""NoveltyCounter: the intrinsic reward, what a commit counts, and that any earlier step comes back exactly."""

import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from empo2.novelty import NoveltyCounter, Visited
from empo2.store import open_store

# sixteen times +-1/4: length 1, cosines exact multiples of 1/8; states tie and lie on the threshold without rounding
KEYS = st.lists(st.sampled_from([-0.25, 0.25]), min_size=16, max_size=16).map(tuple)
EXAMPLES = settings(deadline=None, max_examples=60)


def episode(*keys, texts=None, scope: str = "s") -> Visited:
    vectors = np.stack([np.array(key, np.float32) for key in keys]) if keys else np.zeros((0, 2), np.float32)
    return Visited(scope=scope, texts=texts or [str(key.tolist()) for key in vectors], keys=vectors)


def named(*texts: str) -> Visited:
    """States of one embedding, so that only their texts tell them apart."""
    return episode(*[(1.0, 0.0)] * len(texts), texts=list(texts))


def counter(connection: sqlite3.Connection | None = None, **options) -> NoveltyCounter:
    return NoveltyCounter(connection or open_store(":memory:"), **options)


def counts(connection: sqlite3.Connection, scope: str = "s") -> list[tuple[list[float], int]]:
    """The entries of a scope as they are in the file, oldest first."""
    rows = connection.execute(
        "SELECT key, SUM(count) FROM states JOIN visits ON state = id WHERE scope = ? GROUP BY id ORDER BY id", (scope,)
    )
    return [(np.frombuffer(key, "<f4").tolist(), visits) for key, visits in rows]


@st.composite
def many_episodes(draw) -> list[list[tuple[float, ...]]]:
    """Episodes of states of which some come again, and some are similar."""
    rooms = draw(st.lists(KEYS, min_size=1, max_size=5))
    close = [tuple(-x if i == place else x for i, x in enumerate(room)) for place, room in enumerate(rooms)]
    return draw(st.lists(st.lists(st.sampled_from(rooms + close), max_size=6), min_size=1, max_size=6))


# ---------------------------------------------------------------- against the oracle


@EXAMPLES
@given(many_episodes(), many_episodes(), many_episodes(), st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_rewards_and_commits_equal_the_oracles(first, second, third, threshold):
    """0.75 is exactly the cosine of two keys that differ in two places: equality counts as similar."""
    connection = open_store(":memory:")
    found = counter(connection, threshold=threshold, coefficient=0.5)
    snapshot: list[oracles.Visits] = []
    for step, episodes in enumerate((first, second, third), start=1):
        for states in episodes:
            expected = oracles.novelty_rewards(snapshot, states, threshold=threshold, coefficient=0.5)
            assert found.rewards(episode(*states)) == pytest.approx(expected, abs=1e-12)
        found.commit(step, [episode(*states) for states in episodes])
        snapshot = oracles.novelty_commit(snapshot, [s for states in episodes for s in states], threshold)
        assert counts(connection) == [(list(key), visits) for key, visits in snapshot]
        assert found.distinct_states() == len(snapshot)


@pytest.mark.parametrize("threshold", [0.75, 0.85, 0.95])
def test_rewards_and_commits_equal_the_oracles_on_embeddings_of_real_size(threshold):
    """A dozen rooms, each seen in slightly changed forms."""
    generator = np.random.default_rng(0)
    rooms = generator.normal(size=(12, 384)) + 1.5 * generator.normal(size=384)

    def state() -> np.ndarray:
        seen = rooms[generator.integers(12)] + generator.choice([0.0, 0.3, 0.9]) * generator.normal(size=384)
        return (seen / np.linalg.norm(seen)).astype(np.float32)

    connection = open_store(":memory:")
    found = counter(connection, threshold=threshold)
    snapshot: list[oracles.Visits] = []
    for step in range(1, 4):
        episodes = [[state() for _ in range(6)] for _ in range(4)]
        for states in episodes:
            lists = [key.tolist() for key in states]
            expected = oracles.novelty_rewards(snapshot, lists, threshold=threshold, coefficient=1.0)
            assert found.rewards(episode(*states)) == pytest.approx(expected, abs=1e-12)
        found.commit(step, [episode(*states) for states in episodes])
        snapshot = oracles.novelty_commit(snapshot, [s.tolist() for states in episodes for s in states], threshold)
        assert counts(connection) == [(list(key), visits) for key, visits in snapshot]
    assert 1 < len(snapshot) < 72


@EXAMPLES
@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=6), min_size=1, max_size=5), st.integers(1, 3))
def test_exact_kind_equals_the_oracle_on_one_vector_per_text(episodes, steps):
    one_hot = {text: tuple(float(text == other) for other in "abcde") for text in "abcde"}
    connection = open_store(":memory:")
    found = counter(connection, kind="exact")
    snapshot: list[oracles.Visits] = []
    for step in range(steps):
        for texts in episodes:
            expected = oracles.novelty_rewards(snapshot, [one_hot[t] for t in texts], threshold=1.0, coefficient=1.0)
            assert found.rewards(named(*texts)) == pytest.approx(expected, abs=1e-12)
        found.commit(step + 1, [named(*texts) for texts in episodes])
        snapshot = oracles.novelty_commit(snapshot, [one_hot[t] for texts in episodes for t in texts], 1.0)
        assert [visits for _, visits in counts(connection)] == [visits for _, visits in snapshot]


# ---------------------------------------------------------------- what is the same state


def test_exact_kind_tells_texts_apart_that_have_one_embedding():
    found = counter(kind="exact")
    found.commit(1, [named("kitchen", "hall", "kitchen")])
    assert found.distinct_states() == 2
    assert found.rewards(named("kitchen", "hall", "attic", "attic")) == [1 / 3, 1 / 2, 1.0, 1 / 2]


def test_embedding_kind_takes_texts_of_one_embedding_for_one_state():
    found = counter(kind="embedding")
    found.commit(1, [named("kitchen", "hall", "kitchen")])
    assert found.distinct_states() == 1
    assert found.rewards(named("attic")) == [1 / 4]


def test_a_state_is_itself_even_where_its_cosine_is_rounded_below_1():
    """At threshold 1 only equal embeddings are one state, though a float32 unit vector may be a little short."""
    generator = np.random.default_rng(0)
    keys = generator.normal(size=(50, 384))
    keys = (keys / np.linalg.norm(keys, axis=1, keepdims=True)).astype(np.float32)
    assert any(float(key @ key) < 1 for key in keys)
    found = counter(threshold=1.0)
    found.commit(1, [episode(*keys)])
    assert found.distinct_states() == 50
    assert found.rewards(episode(*keys)) == [1 / 2] * 50


def test_scopes_do_not_see_each_other():
    connection = open_store(":memory:")
    found = counter(connection)
    found.commit(1, [episode((1, 0), scope="one"), episode((1, 0), (1, 0), scope="two")])
    assert [found.rewards(episode((1, 0), scope=scope)) for scope in ("one", "two", "three")] == [[1 / 2], [1 / 3], [1]]
    assert found.distinct_states() == 2


# ---------------------------------------------------------------- what counts when


def test_rewards_by_hand():
    """Never seen, seen again in this episode, and a third time; all halved by the coefficient."""
    found = counter(coefficient=0.5)
    assert found.rewards(episode((1, 0), (1, 0), (0, 1), (1, 0))) == [1 / 2, 1 / 4, 1 / 2, 1 / 6]
    found.commit(1, [episode((1, 0), (1, 0), (0, 1), (1, 0))])
    assert found.rewards(episode((1, 0), (1, 0))) == [0.5 / 4, 0.5 / 5]


@EXAMPLES
@given(many_episodes(), many_episodes(), st.data())
def test_rewards_depend_on_the_snapshot_and_the_own_episode_alone(past, group, data):
    """Identical trajectories get identical rewards; permuting a group permutes them; asking changes nothing."""
    found = counter(threshold=0.75)
    found.commit(1, [episode(*states) for states in past])
    digest = found.digest()
    rewards = [found.rewards(episode(*states)) for states in group]
    order = data.draw(st.permutations(range(len(group))))
    assert [found.rewards(episode(*group[i])) for i in order] == [rewards[i] for i in order]
    assert [found.rewards(episode(*group[0])) for _ in range(3)] == [rewards[0]] * 3
    assert found.digest() == digest


def test_rewards_change_with_the_commit_and_not_before():
    found = counter()
    states = episode((1, 0), (0, 1), (1, 0))
    before = found.rewards(states)
    assert before == [1, 1, 1 / 2]
    assert found.rewards(states) == before
    found.commit(1, [states, states])
    assert found.rewards(states) == [1 / 5, 1 / 3, 1 / 6]


def test_a_commit_that_breaks_off_counts_nothing():
    connection = open_store(":memory:")
    found = counter(connection)
    good = episode((1, 0), (0, 1))
    found.commit(1, [good])
    before = found.rewards(good), counts(connection)
    with pytest.raises(ValueError, match=r"shapes|dimension"):
        found.commit(2, [good, episode((1, 0, 0))])  # another embedder's key
    assert (found.rewards(good), counts(connection)) == before


def test_a_tie_goes_to_the_oldest_entry():
    """(1, 1) / sqrt 2 is as similar to one axis as to the other."""
    middle = (math.sqrt(0.5), math.sqrt(0.5))
    for first, second in (((1.0, 0.0), (0.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))):
        connection = open_store(":memory:")
        found = counter(connection, threshold=0.7)
        found.commit(1, [episode(first, second, middle, middle)])
        assert counts(connection) == [(list(first), 3), (list(second), 1)]


def test_entries_of_one_embedding_tie_wherever_they_stand():
    """Entries made by `exact` are read by `embedding`: the oldest of those that are equal gets the visit."""
    key = np.random.default_rng(1).normal(size=(2, 384))
    key = (key / np.linalg.norm(key, axis=1, keepdims=True)).astype(np.float32)
    for number in range(1, 30):
        connection = open_store(":memory:")
        made = [Visited(scope="s", texts=[f"room {i}" for i in range(number)], keys=np.stack([key[0]] * number))]
        counter(connection, kind="exact").commit(1, made)
        counter(connection, threshold=-1.0).commit(2, [episode(key[1])])
        assert [visits for _, visits in counts(connection)] == [2] + [1] * (number - 1)


def test_states_are_counted_one_after_another_in_the_given_order():
    """Stairs are similar to hall and attic (0.6 and 0.8), which are not to each other."""
    hall, stairs, attic = (1.0, 0.0), (0.6, 0.8), (0.0, 1.0)
    for order, expected in [
        ((hall, stairs, attic), [2, 1]),  # the stairs' visit goes to the hall, so the attic is new
        ((stairs, hall, attic), [3]),  # the stairs are the entry that both are similar to
        ((hall, attic, stairs), [1, 2]),  # the attic is more similar
    ]:
        for split in ([order], [order[:1], order[1:]]):  # in one episode or in two
            connection = open_store(":memory:")
            counter(connection, threshold=0.5).commit(1, [episode(*states) for states in split])
            assert [visits for _, visits in counts(connection)] == expected


# ---------------------------------------------------------------- earlier steps


def history(seed: int, steps: int = 8) -> list[list[Visited]]:
    generator = np.random.default_rng(seed)
    rooms = generator.choice([-0.25, 0.25], size=(15, 16))
    return [
        [
            episode(*rooms[generator.integers(15, size=3)], scope=str(generator.choice(["s", "t"])))
            for _ in range(generator.integers(5))
        ]
        for _ in range(steps)
    ]


def commit_all(found: NoveltyCounter, steps: list[list[Visited]], first: int = 1) -> list[str]:
    """Commit steps `first`, `first` + 1, …; the digest after each."""
    digests = []
    for step, episodes in enumerate(steps, start=first):
        found.commit(step, episodes)
        digests.append(found.digest())
    return digests


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["embedding", "exact"])
def test_rewind_brings_back_exactly_what_was_there_after_any_step(seed, kind):
    steps = history(seed)
    connection = open_store(":memory:")
    found = counter(connection, kind=kind)
    digests = [found.digest(), *commit_all(found, steps)]
    assert len(set(digests)) > 4
    probe = episode(*np.concatenate([visited.keys for episodes in steps for visited in episodes]))
    for step in range(len(steps) + 1):
        fresh = counter(kind=kind)
        commit_all(fresh, steps[:step])
        copy = open_store(":memory:")
        connection.backup(copy)
        found = counter(copy, kind=kind)
        found.rewards(probe)  # what was read before must not be remembered
        found.rewind(step)
        assert found.digest() == digests[step] == fresh.digest()
        assert found.distinct_states() == fresh.distinct_states()
        assert found.rewards(probe) == fresh.rewards(probe)
        assert commit_all(found, steps[step:], first=step + 1) == digests[step + 1 :]


def test_counts_outlive_the_process(tmp_path: Path):
    path = tmp_path / "store.sqlite"
    first = counter(open_store(path))
    commit_all(first, history(0, steps=3))
    again = counter(open_store(path))
    probe = episode(*np.concatenate([visited.keys for episodes in history(0, steps=3) for visited in episodes]))
    assert (again.digest(), again.distinct_states()) == (first.digest(), first.distinct_states())
    assert again.rewards(probe) == first.rewards(probe)
    assert again.distinct_states() > 3


def test_an_episode_without_turns_has_no_rewards_and_counts_nothing():
    found = counter()
    assert found.rewards(episode()) == []
    found.commit(1, [episode()])
    assert found.distinct_states() == 0
