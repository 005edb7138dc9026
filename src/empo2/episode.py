"""A live episode: renders each turn with and without tips when it is created, and keeps the record. Pure.

A prompt is put together from pieces, each tokenized once: the opening (system, worked examples, task, an observation),
then per turn the completion exactly as sampled and the following observation. Which pieces carry tips, and at which
turn the prompt begins, is all that `memory.placement` and `prompt.history` change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from empo2 import prompts
from empo2.chat import ChatFormat, Message
from empo2.memory import Retrieval
from empo2.sequences import common_prefix
from empo2.types import (
    Completion,
    Ending,
    EpisodePlan,
    Rendering,
    StepResult,
    Tip,
    TokenIds,
    Trajectory,
    Turn,
    WorkedExample,
)


@dataclass(frozen=True, kw_only=True)
class PromptRules:
    """How prompts are put together; the same for all episodes of a collector."""

    chat: ChatFormat
    instructions: str
    max_tokens: int  #: longest episode, tips not counted: they must not make an episode shorter
    max_action_tokens: int
    window_turns: int | None  #: None: the whole history
    tips_stay: bool  #: tips stay in the turn where they were shown; False: only the current turn shows tips
    max_tip_tokens: int  #: by which tips may lengthen one prompt
    cue: str = ""  #: words at the end of every user turn
    offers: bool = False  #: the current turn says what can be done there
    reply: prompts.Reply = "line"


@dataclass
class _Open:
    """A turn whose completion is still to come."""

    observation: str
    state: str
    offer: str  #: what can be done, shown while the turn is the current one
    tips: tuple[Tip, ...] = ()
    retrieved: Retrieval | None = None


@dataclass
class LiveEpisode:
    """One episode from reset to end. ``slot`` is where its environment and its KV cache live."""

    plan: EpisodePlan
    slot: int
    rules: PromptRules
    examples: Sequence[WorkedExample]
    restarts: int = 0
    task_text: str = ""
    turns: list[Turn] = field(default_factory=list)
    ending: Ending | None = None
    success: bool = False
    _opens: list[_Open] = field(default_factory=list)
    _pieces: dict[tuple[int, bool, bool, bool], TokenIds] = field(default_factory=dict)
    _prompt: TokenIds = ()
    _plain: TokenIds = ()
    _before: TokenIds = ()
    _plain_before: TokenIds = ()
    _under_way: Turn | None = None  # the turn whose action the environment is working on

    def begin(self, observation: str, info: dict[str, Any]) -> None:
        """Take the environment's first observation; a restarted episode forgets what it did."""
        self.turns, self._opens, self.ending, self.success = [], [], None, False
        self._under_way = None
        self._pieces.clear()
        self._before = self._plain_before = ()
        self.task_text = str(info.get("task", ""))
        self._open(observation, info)

    def _open(self, observation: str, info: Mapping[str, Any]) -> None:
        offer = prompts.offer_of(info) if self.rules.offers else ""
        self._opens.append(_Open(observation, str(info.get("state") or observation), offer))

    @property
    def state(self) -> str:
        """State text of the turn that is to be acted in, or after the last action."""
        return self._opens[-1].state

    @property
    def observation(self) -> str:
        return self._opens[-1].observation

    @property
    def score(self) -> float:
        return sum(turn.reward for turn in self.turns)

    @property
    def acting(self) -> bool:
        """Whether an action is under way in the environment."""
        return self._under_way is not None

    def next_prompt(self, retrieved: Retrieval) -> TokenIds | None:
        """The prompt of the coming turn, with the retrieved tips that it doesn't hold yet and that fit the budget.

        None, and the episode has ended, if the turn without its tips does not fit ``max_tokens``.
        """
        self._plain = self._assemble(plain=True)
        if len(self._plain) > self.rules.max_tokens - self.rules.max_action_tokens:
            self.ending = Ending.TOKEN_LIMIT
            return None
        current = self._opens[-1]
        current.tips, current.retrieved = self._fitting(retrieved.tips), retrieved
        self._prompt = self._assemble(plain=False)
        return self._prompt

    def act(self, completion: Completion) -> str:
        """Record the policy's completion; the action for the environment."""
        action, parsed = prompts.action_of(completion.text, self.rules.reply)
        current = self._opens[-1]
        self._under_way = Turn(
            observation=current.observation,
            state=current.state,
            tips=current.tips,
            prompt=_difference(self._before, self._prompt),
            plain=_difference(self._plain_before, self._plain),
            completion=completion,
            action=action,
            parsed=parsed,
            candidates=current.retrieved.candidates if current.retrieved else 0,
            entries=current.retrieved.entries if current.retrieved else 0,
            valid=parsed,
            reward=0.0,
        )
        self._before = self._prompt + completion.token_ids
        self._plain_before = self._plain + completion.token_ids
        return action

    def observe(self, result: StepResult, max_turns: int) -> None:
        """Take the environment's answer to the action and close the turn."""
        assert self._under_way is not None
        valid = self._under_way.valid and bool(result.info.get("valid", True))
        self.turns.append(replace(self._under_way, valid=valid, reward=result.reward))
        self._under_way = None
        self._open(result.observation, result.info)
        if result.terminated:
            self.ending = Ending.TERMINATED
            self.success = bool(result.info.get("success", False))
        elif result.truncated or len(self.turns) >= max_turns:
            self.ending = Ending.TURN_LIMIT

    def tip_prompt(self, longest: int) -> TokenIds:
        """The conversation as it was seen, then the request for a tip (without the last observation if too long).

        ``longest`` leaves room for the request (`tip_room`).
        """
        last = self.turns[-1].completion.token_ids
        ids: TokenIds = ()
        for observation in (self.observation, ""):
            request = prompts.tip_request(observation, self.score)
            ids = self._before + self.rules.chat.next_turn(last, request)
            if len(ids) <= longest:
                break
        return ids

    def finish(self, policy_version: int, tip: Completion | None) -> Trajectory:
        assert self.ending is not None
        return Trajectory(
            task=self.plan.task,
            mode=self.plan.mode,
            key=self.plan.key,
            policy_version=policy_version,
            turns=tuple(self.turns),
            final_state=self.state,
            final_observation=self.observation,
            ending=self.ending,
            score=self.score,
            success=self.success,
            tip=prompts.tip_of(tip.text) if tip else "",
            tip_tokens=len(tip.token_ids) if tip else 0,
            restarts=self.restarts,
        )

    def _assemble(self, *, plain: bool) -> TokenIds:
        """The prompt of the coming turn from its pieces."""
        now, first = len(self.turns), self._first_turn()
        ids: TokenIds = ()
        for index in range(first, now + 1):
            shows = not plain and (self.rules.tips_stay or index == now)
            if index > first:
                ids += self.turns[index - 1].completion.token_ids
            shows &= bool(self._opens[index].tips)
            ids += self._piece(index, opens=index == first, shows_tips=shows, is_current=index == now)
        return ids

    def _first_turn(self) -> int:
        """The turn at which the coming prompt begins."""
        window = self.rules.window_turns
        return 0 if window is None else max(0, len(self.turns) - window)

    def _piece(self, index: int, *, opens: bool, shows_tips: bool, is_current: bool) -> TokenIds:
        """Ids from the end of completion ``index`` − 1 (or the beginning) to where completion ``index`` starts."""
        offer = self._opens[index].offer if is_current else ""
        key = (index, opens, shows_tips, bool(offer))
        if key not in self._pieces:
            said = self._said(index, self._opens[index].tips if shows_tips else (), opens=opens, offer=offer)
            chat, rules = self.rules.chat, self.rules
            if opens:
                before = prompts.opening(rules.instructions, self.examples, cue=rules.cue, reply=rules.reply)
                self._pieces[key] = chat.conversation([*before, Message(role="user", text=said)])
            else:
                self._pieces[key] = chat.next_turn(self.turns[index - 1].completion.token_ids, said)
        return self._pieces[key]

    def _said(self, index: int, tips: Sequence[Tip], *, opens: bool, offer: str = "") -> str:
        """The user's words of a turn."""
        observation, texts, cue = self._opens[index].observation, prompts.tip_texts(tips), self.rules.cue
        if opens:
            return prompts.first_turn(self.task_text, observation, texts, offer=offer, cue=cue)
        return prompts.turn(observation, texts, offer=offer, cue=cue)

    def _fitting(self, retrieved: Sequence[Tip]) -> tuple[Tip, ...]:
        """Tips that the prompt doesn't hold yet, best first, while they fit its tip budget."""
        now, first = len(self.turns), self._first_turn()
        staying = range(first, now) if self.rules.tips_stay else range(0)
        held = [tip.text for index in staying for tip in self._opens[index].tips]
        spent = sum(self._tip_tokens(index, self._opens[index].tips, opens=index == first) for index in staying)
        chosen: tuple[Tip, ...] = ()
        for tip in retrieved:
            if tip.text in held:
                continue
            if spent + self._tip_tokens(now, (*chosen, tip), opens=now == first) <= self.rules.max_tip_tokens:
                chosen += (tip,)
                held.append(tip.text)
        return chosen

    def _tip_tokens(self, index: int, tips: Sequence[Tip], *, opens: bool) -> int:
        """Tokens by which tips lengthen a turn, the line above them included."""
        if not tips:
            return 0
        with_tips, without = (self._said(index, shown, opens=opens) for shown in (tips, ()))
        return len(self.rules.chat.text_ids(with_tips)) - len(self.rules.chat.text_ids(without))


def tip_room(chat: ChatFormat, tip_tokens: int) -> int:
    """Tokens that asking for a tip and writing it take at most, after the conversation."""
    return len(chat.next_turn((), prompts.tip_request("", -100.125))) + tip_tokens


def _difference(before: TokenIds, prompt: TokenIds) -> Rendering:
    keep = common_prefix(before, prompt)
    return Rendering(keep=keep, new=prompt[keep:])
