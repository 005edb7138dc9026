"""Slow, obvious versions of every equation, for the tests to compare the fast ones with.

Plain floats, lists and loops; only the standard library; nothing from the package under test.
Each docstring says the equation in words and names the section of docs/algorithm.md it comes from.
Where docs/algorithm.md leaves a choice open, the docstring says "Choice:" and makes it.
`worked_example` at the end runs two episodes of three turns through all of it in round numbers.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TypedDict

Key = Sequence[float]
"""A state embedding; need not have length 1."""

Visits = tuple[Key, int]
"""One entry of the novelty list: the state's embedding and how often it was visited."""


class Entry(TypedDict):
    """One tip in the memory: {"key": (1.0, 0.0), "text": "Try the door.", "score": 40.0, "source": 7, "born": 3}."""

    key: Key
    text: str
    score: float
    source: int  # the episode whose tip this is
    born: int  # insertion index: larger is more recent


class LossSequence(TypedDict):
    """What the loss needs of one sequence; the lists run over its completion tokens and have one length."""

    current: Sequence[float]  # log-probs under the policy being updated, on the rendering that is trained on
    behavior: Sequence[float]  # log-probs in the ratio's denominator
    reference: Sequence[float] | None  # log-probs under the frozen reference policy
    advantage: float
    may_mask: bool  # may the low-probability mask act here? By default only in DISTILL


# ---------------------------------------------------------------- returns and advantages


def episode_return(rewards: Sequence[float], novelties: Sequence[float], scale: float) -> float:
    """Sum over the turns of (environment reward times scale, plus novelty). Novelty itself is not scaled.

    Sections 4 and 5.
    """
    total = 0.0
    for reward, novelty in zip(rewards, novelties, strict=True):
        total += reward * scale + novelty
    return total


def group_advantages(returns: list[float], *, std_floor: float, use_std: bool) -> list[float]:
    """Each return minus the group's mean; with `use_std`, divided by the larger of the group's std and the floor.

    The std is unbiased: squared deviations summed and divided by N - 1. Sections 4 and 5.
    Choice: `std_floor` is in the units of `returns`. Choice: equal returns, or a single one, give exactly zero
    (a rounded mean would otherwise leave deviations of 1e-17 for the floor to blow up).
    """
    if all(value == returns[0] for value in returns):
        return [0.0 for _ in returns]
    mean = sum(returns) / len(returns)
    deviations = [value - mean for value in returns]
    if not use_std:
        return deviations
    std = math.sqrt(sum(deviation**2 for deviation in deviations) / (len(returns) - 1))
    return [deviation / max(std, std_floor) for deviation in deviations]


# ---------------------------------------------------------------- loss


def importance_ratio(current: float, behavior: float) -> float:
    """Probability under the current policy divided by probability under the behavior policy, from log-probs.

    Section 6. Raises OverflowError where the ratio leaves the range of a float.
    """
    return math.exp(current - behavior)


def clipped_term(
    ratio: float, advantage: float, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> float:
    """One token's policy-gradient LOSS: minus the clipped objective.

    Objective: the smaller of ratio * A and (ratio held within 1 - low .. 1 + high) * A.
    For A < 0 with a dual clip c the objective is at least c * A; `dual_clip=None` leaves that out.
    Sections 6 and 8.
    """
    held = min(max(ratio, 1.0 - clip_low), 1.0 + clip_high)
    objective = min(ratio * advantage, held * advantage)
    if dual_clip is not None and advantage < 0.0:
        objective = max(objective, dual_clip * advantage)
    return -objective


def low_probability_kept(logprob: float, delta: float | None) -> bool:
    """True where the token keeps its policy-gradient term: its current probability is at least delta.

    Section 7 (dropped where probability < delta, so equality keeps). `None` or 0 keeps every token.
    """
    return delta is None or math.exp(logprob) >= delta


def k3(current: float, reference: float) -> float:
    """KL estimate of one token: x - ln(x) - 1 with x = reference probability / current probability; never negative.

    Section 10.
    """
    log_x = reference - current
    return math.exp(log_x) - log_x - 1.0


def sequence_token_losses(
    sequence: LossSequence,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    delta: float | None,
    kl_coefficient: float,
) -> list[float]:
    """Each completion token's loss: its clipped term, or 0 if masked, plus kl_coefficient * k3.

    A masked token loses only its policy-gradient term; its KL term stays. Sections 7 to 11.
    """
    reference = sequence["reference"]
    if kl_coefficient != 0.0 and reference is None:
        raise ValueError("kl_coefficient is not 0 but a sequence has no reference log-probs; give it some")
    losses = []
    for token, (current, behavior) in enumerate(zip(sequence["current"], sequence["behavior"], strict=True)):
        loss = 0.0
        if not sequence["may_mask"] or low_probability_kept(current, delta):
            ratio = importance_ratio(current, behavior)
            loss += clipped_term(ratio, sequence["advantage"], clip_low, clip_high, dual_clip)
        if kl_coefficient != 0.0 and reference is not None:
            loss += kl_coefficient * k3(current, reference[token])
        losses.append(loss)
    return losses


def policy_loss(
    sequences: Sequence[LossSequence],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    delta: float | None,
    kl_coefficient: float,
    aggregation: str,
    max_tokens: int | None = None,
) -> float:
    """The loss of one global mini-batch: the token losses of all its sequences, summed and divided. Section 9.

    "token": divided by the number of completion tokens of all sequences, masked ones included.
    "sequence": each sequence's sum divided by its own number of tokens, masked ones included; then by the
    number of sequences. "fixed": divided by number of sequences * max_tokens, however long they are.
    Choice: a sequence without tokens adds 0 and counts as a sequence; a batch without tokens has loss 0.
    """
    per_sequence = [
        sequence_token_losses(
            sequence,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            delta=delta,
            kl_coefficient=kl_coefficient,
        )
        for sequence in sequences
    ]
    num_tokens = sum(len(losses) for losses in per_sequence)
    if num_tokens == 0:
        return 0.0
    total = sum(sum(losses) for losses in per_sequence)
    if aggregation == "token":
        return total / num_tokens
    if aggregation == "sequence":
        return sum(sum(losses) / len(losses) for losses in per_sequence if losses) / len(per_sequence)
    if aggregation == "fixed":
        if max_tokens is None:
            raise ValueError('aggregation "fixed" divides by num_sequences * max_tokens; give max_tokens')
        return total / (len(per_sequence) * max_tokens)
    raise ValueError(f'aggregation must be "token", "sequence" or "fixed", got "{aggregation}"')


# ---------------------------------------------------------------- tips


def cosine(a: Key, b: Key) -> float:
    """Dot product divided by both lengths. Choice: 0 if either vector is all zeros. Sections 2 and 3."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    length_a = math.sqrt(sum(x * x for x in a))
    length_b = math.sqrt(sum(y * y for y in b))
    if length_a == 0.0 or length_b == 0.0:
        return 0.0
    return dot / (length_a * length_b)


def retrieve(entries: Sequence[Entry], query: Key, *, threshold: float, k: int, rank: str = "score") -> list[str]:
    """The texts of the k best entries for a state, best first. Section 2.

    1. Candidates: entries whose cosine with the query is strictly greater than the threshold.
    2. Rank all of them by "score" or by "similarity", highest first; ties: the most recent first.
    3. Walk down the ranking. Skip an entry whose source (episode) or whose exact text was already taken; take
       any other; stop when k are taken. So what is skipped never uses up one of the k places.
    Choice: this order of the filters.
    """
    if rank not in ("score", "similarity"):
        raise ValueError(f'rank must be "score" or "similarity", got "{rank}"')
    candidates = []
    for entry in entries:
        similarity = cosine(entry["key"], query)
        if similarity > threshold:
            candidates.append((entry["score"] if rank == "score" else similarity, entry["born"], entry))
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1]), reverse=True)
    texts: list[str] = []
    sources: list[int] = []
    for _, _, entry in candidates:
        if len(texts) == k:
            break
        if entry["source"] not in sources and entry["text"] not in texts:
            texts.append(entry["text"])
            sources.append(entry["source"])
    return texts


def evict(entries: Sequence[Entry], max_entries: int) -> list[Entry]:
    """While there are more than max_entries, the oldest goes; the others keep their order. Section 2."""
    kept = list(entries)
    while len(kept) > max_entries:
        kept.remove(min(kept, key=lambda entry: entry["born"]))
    return kept


# ---------------------------------------------------------------- novelty


def novelty_rewards(
    snapshot: Sequence[Visits], episode_states: Sequence[Key], *, threshold: float, coefficient: float
) -> list[float]:
    """For each turn coefficient / n, where n = 1 + visits to similar states. Similar: cosine >= threshold.

    Visits to similar states are the visits of ALL similar entries of the step-start snapshot, plus how many of this
    episode's own earlier turns saw a similar state. Other episodes of the step do not count. Section 3.
    """
    rewards = []
    for turn, state in enumerate(episode_states):
        n = 1
        for key, visits in snapshot:
            if cosine(key, state) >= threshold:
                n += visits
        for earlier in episode_states[:turn]:
            if cosine(earlier, state) >= threshold:
                n += 1
        rewards.append(coefficient / n)
    return rewards


def novelty_commit(snapshot: Sequence[Visits], states_in_order: Sequence[Key], threshold: float) -> list[Visits]:
    """The novelty list after the step's states, in the order (group, episode, turn). Section 3.

    A state similar (cosine >= threshold) to no entry becomes the newest entry, with 1 visit; otherwise the visits of
    its most similar entry grow by 1. Choice: ties go to the oldest entry. Choice: one state after another, so an
    entry made by a state is there for the next one. An entry's key never changes.
    """
    entries = list(snapshot)
    for state in states_in_order:
        best, best_similarity = None, -math.inf
        for index, (key, _) in enumerate(entries):
            similarity = cosine(key, state)
            if similarity >= threshold and similarity > best_similarity:
                best, best_similarity = index, similarity
        if best is None:
            entries.append((state, 1))
        else:
            entries[best] = (entries[best][0], entries[best][1] + 1)
    return entries


# ---------------------------------------------------------------- modes, learning rate, sampling


def expected_mode_shares(p: float, q: float) -> dict[str, float]:
    """Memory is used with probability p; what used it is then trained off-policy with probability q.

    So plain 1 - p, with_tips p(1 - q), distill pq. Section 1.
    """
    return {"plain": 1.0 - p, "with_tips": p * (1.0 - q), "distill": p * q}


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """The learning rate of training step `step`, counted from 0. (Section 12.)

    Warm-up: peak * (step + 1) / warmup_steps while step < warmup_steps, so its last step has the peak already.
    After it "constant": the peak. "linear": falls in a straight line from the peak at step warmup_steps to 0 at step
    total_steps, which is one past the last step. "cosine": falls between the same ends as half a cosine wave.
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ValueError(f'schedule must be "constant", "linear" or "cosine", got "{schedule}"')
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * (1.0 + math.cos(math.pi * progress)) / 2.0


def sample_token(logits: Sequence[float], temperature: float, uniform: float) -> int:
    """The token whose slice of the line from 0 to 1 holds `uniform`, a number with 0 <= uniform < 1.

    The slices are softmax(logits / temperature), laid end to end in vocabulary order; each holds its left end but not
    its right one. The caller's stream gives `uniform`.
    Choice: temperature 0 is greedy, the lowest token id on ties. Choice: where rounding leaves `uniform` beyond the
    last slice, the last token with a slice is taken. A logit of -inf has none.
    """
    largest = max(logits)
    if temperature == 0.0:
        return list(logits).index(largest)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    total = sum(weights)
    right_end, last = 0.0, 0
    for token, weight in enumerate(weights):
        if weight == 0.0:
            continue
        right_end += weight / total
        if uniform < right_end:
            return token
        last = token
    return last


# ---------------------------------------------------------------- the worked example

HALL = (1.0, 0.0)
STAIRS = (0.6, 0.8)  # cosine with HALL 0.6, with ATTIC 0.8
ATTIC = (0.0, 1.0)  # cosine with HALL 0

EPISODE_STATES = ((HALL, STAIRS, ATTIC), (HALL, HALL, STAIRS))
EPISODE_ACTIONS = (("go up", "go on up", "take lamp"), ("look", "go up", "jump"))
EPISODE_REWARDS = ((0.0, 20.0, 60.0), (0.0, 0.0, -50.0))
EPISODE_TIPS = ("The lamp is in the attic.", "Never jump on the stairs.")

# Two completion tokens a turn, three turns: the probability of each sampled token. The worked ratios are
#   DISTILL, plain:    1, 1.5 | 0.75, 1.2 | 1.2, 1.25      behavior: 0.5, 0.5 | 0.2, 0.01 | 0.6, 1.5
#   PLAIN, either:     1, 0.5 | 1.5, 0.5  | 12, 1
DISTILL_CURRENT = (0.40, 0.45, 0.15, 0.006, 0.48, 0.90)  # without tips, policy being updated; 0.006 < exp(-5)
DISTILL_BEHAVIOR_TIPS = (0.80, 0.90, 0.75, 0.600, 0.80, 0.60)  # with tips, policy that collected
DISTILL_BEHAVIOR_PLAIN = (0.40, 0.30, 0.20, 0.005, 0.40, 0.72)  # without tips, policy that collected
PLAIN_CURRENT = (0.50, 0.20, 0.75, 0.004, 0.48, 0.90)  # 0.004 < exp(-5) too, but PLAIN is not masked
PLAIN_BEHAVIOR = (0.50, 0.40, 0.50, 0.008, 0.04, 0.90)  # no tips were shown: one denominator for both settings


def _tip_text(tip: str, action: str, score: float) -> str:
    """Tip + that turn's action + the episode's final score; section 2 does not fix the wording."""
    return f"{tip} Action: {action}. Score: {score:g}."


def _worked_tips() -> dict[str, object]:
    """Retrieval for each turn of episode 1 (it acts with tips), then both episodes' tips stored, one entry a turn."""
    upstairs, caution = "Go upstairs.", "Beware of the dark."
    memory: list[Entry] = [
        {"key": HALL, "text": _tip_text(upstairs, "go up", 40.0), "score": 40.0, "source": 11, "born": 0},
        {"key": STAIRS, "text": _tip_text(upstairs, "go on up", 40.0), "score": 40.0, "source": 12, "born": 1},
        {"key": HALL, "text": _tip_text(upstairs, "go up", 40.0), "score": 40.0, "source": 12, "born": 2},
        {"key": ATTIC, "text": _tip_text(caution, "wait", 20.0), "score": 20.0, "source": 13, "born": 3},
    ]
    states = EPISODE_STATES[0]
    retrieved = [retrieve(memory, state, threshold=0.5, k=2) for state in states]
    by_similarity = [retrieve(memory, state, threshold=0.5, k=2, rank="similarity") for state in states]
    # Choice: shown once an episode = retrieved as ever, then without the texts that already stand in the episode.
    shown: list[list[str]] = []
    for texts in retrieved:
        before = [text for turn in shown for text in turn]
        shown.append([text for text in texts if text not in before])
    after = list(memory)
    for episode, states in enumerate(EPISODE_STATES):
        score = sum(EPISODE_REWARDS[episode])
        for state, action in zip(states, EPISODE_ACTIONS[episode], strict=True):
            text = _tip_text(EPISODE_TIPS[episode], action, score)
            after.append({"key": state, "text": text, "score": score, "source": 21 + episode, "born": len(after)})
    return {
        "memory": memory,
        "similarities": [[cosine(entry["key"], state) for entry in memory] for state in EPISODE_STATES[0]],
        "retrieved": retrieved,
        "retrieved_by_similarity": by_similarity,
        "shown": shown,
        "memory_after": evict(after, 8),
    }


def _worked_loss(advantages: Sequence[float]) -> dict[str, object]:
    """Episode 1 as DISTILL and episode 2 as PLAIN, under both settings of the off-policy ratio."""
    logs = [
        [math.log(probability) for probability in row]
        for row in (DISTILL_CURRENT, DISTILL_BEHAVIOR_TIPS, DISTILL_BEHAVIOR_PLAIN, PLAIN_CURRENT, PLAIN_BEHAVIOR)
    ]
    distill_current, distill_tips, distill_plain, plain_current, plain_behavior = logs
    # The reference policy agrees with the current one, but finds the masked token twice as likely.
    reference = [logprob + (math.log(2.0) if token == 3 else 0.0) for token, logprob in enumerate(distill_current)]
    delta = math.exp(-5.0)
    token_losses = partial(sequence_token_losses, clip_low=0.2, clip_high=0.3, dual_clip=10.0)
    loss = partial(policy_loss, clip_low=0.2, clip_high=0.3, dual_clip=10.0)
    result: dict[str, object] = {
        "current": [distill_current, plain_current],
        "behavior_with_tips": [distill_tips, plain_behavior],
        "behavior_plain": [distill_plain, plain_behavior],
        "reference": [reference, plain_current],
        "delta": delta,
        "kept": [
            [low_probability_kept(logprob, delta) for logprob in distill_current],
            [True for _ in plain_current],
        ],
        "k3": [k3(current, frozen) for current, frozen in zip(distill_current, reference, strict=True)],
    }
    for setting, behavior in (("plain", distill_plain), ("behavior", distill_tips)):
        batch: list[LossSequence] = [
            {
                "current": distill_current,
                "behavior": behavior,
                "reference": reference,
                "advantage": advantages[0],
                "may_mask": True,
            },
            {
                "current": plain_current,
                "behavior": plain_behavior,
                "reference": plain_current,
                "advantage": advantages[1],
                "may_mask": False,
            },
        ]
        result[setting] = {
            "ratios": [
                [importance_ratio(*pair) for pair in zip(row["current"], row["behavior"], strict=True)] for row in batch
            ],
            "token_losses": [token_losses(row, delta=delta, kl_coefficient=0.0) for row in batch],
            "loss": loss(batch, delta=delta, kl_coefficient=0.0, aggregation="token"),
            "loss_sequence": loss(batch, delta=delta, kl_coefficient=0.0, aggregation="sequence"),
            "loss_fixed": loss(batch, delta=delta, kl_coefficient=0.0, aggregation="fixed", max_tokens=10),
            "loss_without_mask": loss(batch, delta=None, kl_coefficient=0.0, aggregation="token"),
            "loss_with_kl": loss(batch, delta=delta, kl_coefficient=0.12, aggregation="token"),
        }
    return result


def worked_example() -> dict[str, object]:
    """Two episodes of three turns, one group, every number.

    Tips (threshold 0.5, k 2). In the hall the attic's entry has cosine 0; of the other three, all with score 40, the
    most recent (born 2) is taken, born 1 has its source and born 0 its text: one tip. On the stairs the same happens,
    then born 3 (score 20) takes the second place. In the attic born 1 and born 3 are left, and are taken.
    Novelty (threshold 0.75: stairs and attic are similar, the hall to neither; snapshot attic 2 visits, stairs 1).
    Episode 1: n = 1, 1 + 3, 1 + 3 + 1 -> 1 + 0.25 + 0.2. Episode 2: n = 1, 1 + 1, 1 + 3 -> 1 + 0.5 + 0.25.
    Returns (scale 0.01): 0.8 + 1.45 = 2.25 and -0.5 + 1.75 = 1.25; mean 1.75, std sqrt(0.5), advantages +-sqrt(0.5).
    Loss (clip 0.2 / 0.3, dual clip 10, 12 tokens), in units of sqrt(0.5). Episode 1, a > 0, is min(ratio, 1.3) each:
    plain 1 + 1.3 + 0.75 + masked + 1.2 + 1.25 = 5.5, behavior 0.5 + 0.5 + 0.2 + masked + 0.6 + 1.3 = 3.1.
    Episode 2, a < 0, is max(ratio, 0.8), at most 10: 1 + 0.8 + 1.5 + 0.8 + 10 + 1 = 15.1.
    So plain (15.1 - 5.5) / 12 = 0.8 and behavior (15.1 - 3.1) / 12 = 1.0.
    Fixed with max_tokens 10: 0.48 and 0.6. Without the mask: (15.1 - 6.7) / 12 = 0.7 and (15.1 - 3.11) / 12.
    With KL coefficient 0.12: + 0.12 * (2 - ln 2 - 1) / 12, all of it from the masked token.
    Two modes in one group need mode granularity per_episode.
    """
    snapshot: list[Visits] = [(ATTIC, 2), (STAIRS, 1)]
    novelties = [novelty_rewards(snapshot, states, threshold=0.75, coefficient=1.0) for states in EPISODE_STATES]
    returns = [
        episode_return(rewards, novelty, 0.01) for rewards, novelty in zip(EPISODE_REWARDS, novelties, strict=True)
    ]
    advantages = group_advantages(returns, std_floor=1e-6, use_std=True)
    return {
        "states": EPISODE_STATES,
        "rewards": EPISODE_REWARDS,
        "tips": _worked_tips(),
        "novelty_snapshot": snapshot,
        "novelties": novelties,
        "novelty_after": novelty_commit(snapshot, [s for states in EPISODE_STATES for s in states], 0.75),
        "scores": [sum(rewards) for rewards in EPISODE_REWARDS],
        "returns": returns,
        "advantages": advantages,
        "advantages_without_std": group_advantages(returns, std_floor=1e-6, use_std=False),
        "loss": _worked_loss(advantages),
    }
