"""A person plays an environment in the terminal, or reads how an episode of a policy went."""

from collections.abc import Callable

from empo2.envs.base import Suite
from empo2.types import Environment, Task, Trajectory

HELP = ":actions what can be done here · :solution a worked episode · :restart · :quit (or Ctrl-D)"


def by_hand(suite: Suite, task: Task, say: Callable[[str], None], ask: Callable[[str], str]) -> None:
    """Play a task until `:quit`; ``ask`` gets the prompt and returns a line, or raises EOFError at the end of input."""
    environment = suite.open()
    try:
        say(f"{suite.instructions()}\n\n{HELP}\n")
        while _episode(environment, task, say, ask):
            say("")
    except EOFError:
        say("")
    finally:
        environment.close()


def _episode(environment: Environment, task: Task, say: Callable[[str], None], ask: Callable[[str], str]) -> bool:
    """One episode; whether another one is to follow."""
    observation, info = environment.reset(task, 0)
    turns, score, over = 0, 0.0, False
    say(f"{task}\n{info.get('task', '')}\n\n{observation}".replace("\n\n\n", "\n\n"))
    while True:
        reply = ask(f"\n[{turns} turns, score {score:g}]> ")
        if reply.strip() in (":quit", ":q"):
            return False
        if reply.strip() == ":restart":
            return True
        if reply.strip() == ":actions":
            found = info.get("actions") or (
                environment.valid_actions() if hasattr(environment, "valid_actions") else ()
            )
            say(", ".join(found) or "The environment does not say what can be done here.")
        elif reply.strip() == ":solution":
            say(_solution(environment, task))
            return True
        elif reply.startswith(":"):
            say(HELP)
        elif over:
            say("The episode is over; :restart begins another one.")
        else:
            observation, reward, terminated, truncated, info = environment.step(reply)
            turns, score, over = turns + 1, score + reward, terminated or truncated
            told = "" if info.get("valid", True) else "(not a valid action) "
            say(f"{told}{observation}" + (f"\n{reward:+g}" if reward else ""))
            if over:
                ending = "solved" if info.get("success") else "not solved"
                say(f"\nThe episode is over after {turns} turns: score {score:g}, {ending}. {HELP}")


def _solution(environment: Environment, task: Task) -> str:
    """The actions of the environment's worked example; the episode that was under way is lost."""
    example = environment.worked_example(task) if hasattr(environment, "worked_example") else None
    if example is None:
        return "The environment knows no solution. The episode begins anew."
    return "\n".join(action for _, action in example.turns) + "\nThe episode begins anew."


def told(trajectory: Trajectory) -> str:
    """An episode as it went: observations, the tips shown, actions, rewards, and how it ended."""
    lines = [f"{trajectory.task} · {trajectory.mode.value}"]
    for number, turn in enumerate(trajectory.turns, start=1):
        lines.append(f"\n{turn.observation}")
        lines += [f"  tip: {tip.text}" for tip in turn.tips]
        notes = f"{'' if turn.valid else '  (not valid)'}{f'  {turn.reward:+g}' if turn.reward else ''}"
        lines.append(f"{number:>3}> {turn.action}{notes}")
    ended = "solved" if trajectory.success else f"not solved ({trajectory.ending.value})"
    lines += [f"\n{trajectory.final_observation}", f"score {trajectory.score:g}, {ended}\n"]
    return "\n".join(lines)
