"""What the policy is told, as chat messages: worked examples, task, observations, tips, and the request for a tip.

Pure: values in, messages and text out. A turn's text with tips and without comes from the same function, called with
and without them; nothing is ever cut out of a rendered prompt.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from empo2.chat import Message
from empo2.types import Tip, Trajectory, Turn, WorkedExample

Reply = Literal["line", "tags"]  #: how an action stands in a reply: as its first line, or in <action> tags
_REPLY_WITH_ONE = r"Reply with one [\w ]+?(?: and nothing else)?\."  #: how instructions ask for an action alone
THINK_FIRST = (
    "First reason about what you see, inside <think> </think>. Then give one action inside <action> </action>."
)


def opening(
    instructions: str, examples: Sequence[WorkedExample], *, cue: str = "", reply: Reply = "line"
) -> list[Message]:
    """System message and worked examples as chat turns; the task with its first observation (`first_turn`) follows."""
    if reply == "tags":
        said = re.search(_REPLY_WITH_ONE, instructions)
        instructions = instructions.replace(said[0], THINK_FIRST) if said else f"{instructions} {THINK_FIRST}"
    messages = [Message(role="system", text=instructions)]
    for example in examples:
        for index, (seen, action) in enumerate(example.turns):
            text = first_turn(example.task_text, seen, cue=cue) if index == 0 else turn(seen, cue=cue)
            replied = f"<action>{action}</action>" if reply == "tags" else action
            messages += [Message(role="user", text=text), Message(role="assistant", text=replied)]
    return messages


def first_turn(task_text: str, observation: str, tips: Sequence[str] = (), *, offer: str = "", cue: str = "") -> str:
    """The user's words that open an episode."""
    return f"New task. {task_text}\n\n{turn(observation, tips, offer=offer, cue=cue)}"


def turn(observation: str, tips: Sequence[str] = (), *, offer: str = "", cue: str = "") -> str:
    """The user's words of one turn: tips, if any, what the environment said, what can be done, and the cue to act."""
    shown = "\n".join(f"- {tip}" for tip in tips)
    parts = [f"Tips from earlier attempts at this task:\n{shown}" if tips else "", observation, offer, cue]
    return "\n\n".join(part for part in parts if part)


def offer_of(info: Mapping[str, Any]) -> str:
    """What an environment says can be done: its own words (``info["offer"]``), or its actions; empty if nothing."""
    actions = info.get("actions") or ()
    return str(info.get("offer") or ("\n".join(("You can:", *actions)) if actions else ""))


def tip_request(final_observation: str, score: float) -> str:
    """The user's words that ask the acting policy for its tip."""
    return (
        f"{final_observation}\n\nThe attempt is over. Final score: {score:g}.\n"
        "Write one tip for the next attempt at this task: one sentence on one line, under 100 words. "
        "Say what happened, what was learned, and how far from completing the task it was."
    )


def action_of(completion: str, reply: Reply = "line") -> tuple[str, bool]:
    """The action a completion asks for, and whether it could be read.

    It is the first line that is not blank, or what stands in the last pair of <action> tags.
    """
    if reply == "tags":
        found = re.findall(r"<action>((?:(?!<action>).)*?)</action>", completion, re.DOTALL)
        action = " ".join(found[-1].split()) if found else ""
        return action, bool(action)
    action = first_line(completion)
    return action, bool(action)


def first_line(text: str) -> str:
    """The first line that is not blank, with single blanks; empty if there is none."""
    return next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")


def tip_of(completion: str) -> str:
    """The tip in a completion: its first line that is not blank, with single blanks; empty if there is none."""
    return first_line(completion)


def stored_tip(tip: str, suffix: str, score: float) -> str:
    """Text of a memory entry: the tip, what was done, the final score (EMPO² section 4.1)."""
    return " ".join(part for part in (tip, suffix, f"(final score: {score:g})") if part)


def tip_suffix(trajectory: Trajectory, at: Turn, kind: str, *, final: bool = False) -> str:
    """What was done, as `memory.suffix` asks: the turn's action, the episode's actions, or state → action pairs.

    Actions that the environment did not know are left out of the lists. ``final``: the entry stands under the state
    after the action, not under the one in which it was taken.
    """
    if kind == "action":
        before = "Last action" if final else f"Action taken {place_of(at.state) or 'here'}"
        return f"{before}: {at.action}." if at.action else ""
    known = [turn for turn in trajectory.turns if turn.valid and turn.action]
    if kind == "actions":
        return f"Actions: {'; '.join(turn.action for turn in known)}." if known else ""
    pairs = "; ".join(f"{place_of(turn.state) or _words(turn.state)}: {turn.action}" for turn in known)
    return f"Done: {pairs}." if pairs else ""


def place_of(state: str) -> str:
    """Where a state is, "in the kitchen", if its text says so; else empty."""
    named = re.search(r"\b(?:called|in) (the )?([\w' -]{1,40}?)[.,\n]", state)
    return f"in {named.group(1) or ''}{named.group(2)}" if named else ""


def place_name(state: str) -> str:
    """`kitchen` where `place_of` says "in the kitchen"; else empty."""
    return place_of(state).removeprefix("in ").removeprefix("the ")


def _words(state: str) -> str:
    return " ".join(state.split()[:8])


def tip_texts(tips: Sequence[Tip]) -> list[str]:
    return [tip.text for tip in tips]
