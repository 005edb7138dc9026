"""Prompts word for word, and what is read out of a completion."""

import time

import pytest

from empo2 import prompts
from empo2.chat import Message
from empo2.envs.base import suite
from empo2.types import (
    Completion,
    Ending,
    EpisodeKey,
    Mode,
    Rendering,
    Task,
    Tip,
    Trajectory,
    Turn,
    WorkedExample,
)

EXAMPLE = WorkedExample(task_text="Find the coin.", turns=(("The hall.", "go east"), ("A coin.", "take coin")))


def turn(action: str, state: str = "", *, valid: bool = True) -> Turn:
    return Turn(
        observation=state,
        state=state,
        tips=(),
        prompt=Rendering(keep=0, new=(1,)),
        plain=Rendering(keep=0, new=(1,)),
        completion=Completion(token_ids=(2,), logprobs=(-1.0,), text=action, truncated=False),
        action=action,
        parsed=bool(action),
        valid=valid,
        reward=0.0,
    )


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(
        task=Task(environment="toy", name="coin-3", variation=0),
        mode=Mode.PLAIN,
        key=EpisodeKey(1, 2, 3),
        policy_version=0,
        turns=turns,
        final_state="",
        ending=Ending.TURN_LIMIT,
        score=0.0,
        success=False,
    )


def test_opening_with_an_example_and_tips():
    assert prompts.opening("Act.", [EXAMPLE]) == [
        Message(role="system", text="Act."),
        Message(role="user", text="New task. Find the coin.\n\nThe hall."),
        Message(role="assistant", text="go east"),
        Message(role="user", text="A coin."),
        Message(role="assistant", text="take coin"),
    ]
    assert prompts.first_turn("Find it.", "A door.", ["Open it.", "Look."]) == (
        "New task. Find it.\n\nTips from earlier attempts at this task:\n- Open it.\n- Look.\n\nA door."
    )


def test_opening_without_anything():
    assert prompts.opening("Act.", []) == [Message(role="system", text="Act.")]
    assert prompts.first_turn("Find it.", "A door.") == "New task. Find it.\n\nA door."


def test_a_cue_ends_every_user_turn_and_no_other_message():
    said = prompts.opening("Act.", [EXAMPLE], cue="Next action:")
    assert [message.text.endswith("\n\nNext action:") for message in said] == [
        message.role == "user" for message in said
    ]
    assert prompts.first_turn("Find it.", "A door.", ["Look."], cue="Next action:").endswith("A door.\n\nNext action:")
    assert prompts.turn("A hall.", cue="Next action:") == "A hall.\n\nNext action:"
    assert prompts.turn("A hall.", ["Look."], cue="Next action:").endswith("- Look.\n\nA hall.\n\nNext action:")


@pytest.mark.parametrize("observation", ["A hall.", "", "two\n\nlines\n", " Tips from earlier attempts: none "])
def test_a_turn_without_tips_is_the_observation(observation):
    assert prompts.turn(observation) == prompts.turn(observation, []) == observation


def test_request_for_a_tip():
    text = prompts.tip_request("The door is shut.", 62.5)
    assert text.startswith("The door is shut.\n\nThe attempt is over. Final score: 62.5.\n")
    assert "one tip" in text
    assert "Final score: -100.\n" in prompts.tip_request("", -100.0)


@pytest.mark.parametrize(
    ("completion", "action"),
    [
        ("go north", "go north"),
        ("  go   north \t", "go north"),
        ("\n\n go north\nthen take coin", "go north"),
        ("go north\r\nlook", "go north"),
        ("<|im_start|>go", "<|im_start|>go"),
    ],
)
def test_the_action_is_the_first_line_that_is_not_blank(completion, action):
    assert prompts.action_of(completion) == (action, True)
    assert prompts.tip_of(completion) == action


@pytest.mark.parametrize("completion", ["", "   ", "\n \n\t"])
def test_a_blank_completion_is_no_action(completion):
    assert prompts.action_of(completion) == ("", False)
    assert prompts.tip_of(completion) == ""


def test_stored_tip():
    assert prompts.stored_tip("Open the door.", "Action taken here: look.", 25.0) == (
        "Open the door. Action taken here: look. (final score: 25)"
    )
    assert prompts.stored_tip("Open the door.", "", -12.5) == "Open the door. (final score: -12.5)"


STATES = (
    "This room is called the kitchen.\nA stove.",
    "You are in the long hall, dark.",
    "One two\nthree four",
)
EPISODE = trajectory(turn("go hall", STATES[0]), turn("jump", STATES[1], valid=False), turn("take coin", STATES[2]))


def test_suffix_action_is_what_was_done_in_that_turn():
    assert prompts.tip_suffix(EPISODE, EPISODE.turns[1], "action") == "Action taken in the long hall: jump."
    assert prompts.tip_suffix(EPISODE, EPISODE.turns[2], "action") == "Action taken here: take coin."
    assert prompts.tip_suffix(EPISODE, turn(""), "action") == ""


def test_suffix_actions_leaves_out_what_the_environment_did_not_know():
    assert prompts.tip_suffix(EPISODE, EPISODE.turns[0], "actions") == "Actions: go hall; take coin."


def test_suffix_state_actions_names_the_places():
    assert prompts.tip_suffix(EPISODE, EPISODE.turns[0], "state_actions") == (
        "Done: in the kitchen: go hall; One two three four: take coin."
    )
    dark = trajectory(turn("jump", STATES[1]))
    assert prompts.tip_suffix(dark, dark.turns[0], "state_actions") == "Done: in the long hall: jump."
    wordy = trajectory(turn("look", "a b c d e f g h i j"))
    assert prompts.tip_suffix(wordy, wordy.turns[0], "state_actions") == "Done: a b c d e f g h: look."


@pytest.mark.parametrize("kind", ["actions", "state_actions"])
def test_suffix_is_empty_where_nothing_valid_was_done(kind):
    idle = trajectory(turn("jump", "A hall.", valid=False), turn("", "A hall."))
    assert prompts.tip_suffix(idle, idle.turns[0], kind) == ""


def test_tips_keep_their_order():
    tips = [Tip(text=text, score=1.0, similarity=0.9, source=EpisodeKey(0, 0, 0)) for text in ("b", "a")]
    assert prompts.tip_texts(tips) == ["b", "a"]


# ---------------------------------------------------------------- actions in tags, and what can be done


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("<think>The shop.</think><action>search[red shirt]</action>", ("search[red shirt]", True)),
        ("<action>\n click[buy\nnow] </action> and so on", ("click[buy now]", True)),
        ("<action>first</action> no, <action>second</action>", ("second", True)),
        ("<action><action>inner</action>", ("inner", True)),
        ("<action>cut off", ("", False)),
        ("<action> </action>", ("", False)),
        ("search[red shirt]", ("", False)),
        ("", ("", False)),
    ],
)
def test_the_action_in_tags(completion, found):
    assert prompts.action_of(completion, "tags") == found


def test_a_long_reply_of_tags_is_read_quickly():
    """No backtracking without end."""
    started = time.perf_counter()
    assert prompts.action_of("<action>" * 12_500, "tags") == ("", False)
    assert prompts.action_of("<action>" + "x" * 100_000, "tags") == ("", False)
    assert time.perf_counter() - started < 2


def test_instructions_ask_for_tags():
    def system(instructions: str) -> str:
        return prompts.opening(instructions, [], reply="tags")[0].text

    assert system("Shop. Reply with one action and nothing else. Actions: buy.") == (
        f"Shop. {prompts.THINK_FIRST} Actions: buy."
    )
    assert system("Say a number.") == f"Say a number. {prompts.THINK_FIRST}"
    assert system("Reply with one number and nothing else.") == prompts.THINK_FIRST
    assert system("Reply with one door.") == prompts.THINK_FIRST


@pytest.mark.parametrize("name", ["scienceworld", "webshop", "textworld-express"])
def test_the_benchmarks_instructions_say_how_to_reply_in_words_that_can_be_exchanged(name):
    told = prompts.opening(suite(name).instructions(), [], reply="tags")[0].text
    assert told.count(prompts.THINK_FIRST) == max(1, suite(name).instructions().count("Reply with one action"))
    assert "nothing else" not in told


def test_what_can_be_done_in_words():
    assert prompts.offer_of({}) == prompts.offer_of({"actions": ()}) == ""
    assert prompts.offer_of({"actions": ("go north", "wait")}) == "You can:\ngo north\nwait"
    assert prompts.offer_of({"actions": ("wait",), "offer": "Forms: go OBJ."}) == "Forms: go OBJ."
    assert prompts.turn("A hall.", ["tip"], offer="You can: wait.", cue="Next:") == (
        "Tips from earlier attempts at this task:\n- tip\n\nA hall.\n\nYou can: wait.\n\nNext:"
    )
