"""Chat messages → token pieces that can be appended without re-tokenizing what came before.

`ChatFormat.of(tokenizer)` reads the text between messages ("glue", with its control tokens) off the tokenizer's own
template, by rendering marked messages; then it checks the pieces, id for id, against a full rendering. A template that
cannot be taken apart this way is refused.

What a message *says* is always text: a control token such as `<|im_end|>` in an observation, a tip or a user's words
is split into ordinary pieces.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from empo2.errors import UsageError
from empo2.types import TokenIds

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Message:
    role: Role
    text: str


@dataclass(frozen=True)
class ChatFormat:
    """The glue of one chat template; its tokenizer must not change any more. ChatML's, with a system message::

    opening      '<|im_start|>system\\n'       before the first message
    after[system → user]      '<|im_end|>\\n<|im_start|>user\\n'
    after[user → assistant]   '<|im_end|>\\n<|im_start|>assistant\\n'   also opens a generation
    after[assistant → user]   '<|im_end|>\\n<|im_start|>user\\n'        its first id closes a completion
    """

    tokenizer: Any
    opening: str
    system_to_user: str
    user_to_assistant: str
    assistant_to_user: str
    stop_ids: frozenset[int]  #: ids that end a completion
    closer: int  #: the id with which the template itself ends an assistant message

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """Take a tokenizer's template apart. Raises UsageError where that cannot be done exactly."""
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the model's tokenizer has no chat template, but observations and actions are chat turns; "
                "use an instruct model or add a chat_template to its tokenizer_config.json"
            )
        marks = [f"⟦{index}⟧" for index in range(5)]
        roles: tuple[Role, ...] = ("system", "user", "assistant", "user", "assistant")
        marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            whole = tokenizer.apply_chat_template(marked, tokenize=False)
            open_turn = tokenizer.apply_chat_template(marked[:4], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja errors of their own making
            raise UsageError(f"the tokenizer's chat template refuses system/user/assistant turns: {error}") from error
        glue, rest = [], whole
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise UsageError("the tokenizer's chat template drops or reorders messages; use an append-only one")
            glue.append(before)
        opening, system_to_user, user_to_assistant, assistant_to_user, again = glue
        if again != user_to_assistant or not open_turn.endswith(marks[3] + user_to_assistant):
            raise UsageError(
                "the tokenizer's chat template writes history and a new generation differently, so an episode cannot "
                "grow by appending; use a template without such rules (for example the one for non-thinking chat)"
            )
        closing = tokenizer(assistant_to_user, add_special_tokens=False)["input_ids"]
        stops = {closing[0], *_ids(tokenizer.eos_token_id)}
        made = cls(
            tokenizer=tokenizer,
            opening=opening,
            system_to_user=system_to_user,
            user_to_assistant=user_to_assistant,
            assistant_to_user=assistant_to_user,
            stop_ids=frozenset(stops),
            closer=closing[0],
        )
        made._check()
        return made

    def _check(self) -> None:
        for reasoning in ("<think>\nNorth?\n</think>\n\n", ""):
            sample = [
                Message(role="system", text="You act in a world."),
                Message(role="user", text="Task: find it.\n\nA room."),
                Message(role="assistant", text=f"{reasoning}go north"),
                Message(role="user", text="You move."),
            ]
            expected = self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.text} for m in sample], tokenize=False, add_generation_prompt=True
            )
            if self._text(sample) != expected:
                raise UsageError(
                    "the tokenizer's chat template changes what messages say (such as past reasoning), but "
                    "completions stay as they were sampled; use a template that writes messages as they are"
                )
        if self.conversation(sample) != self._glue_ids(expected):
            raise UsageError(
                "the tokenizer merges text across the borders of chat messages, so pieces cannot be appended exactly; "
                "use a model whose chat template separates messages with control tokens"
            )

    def text_ids(self, text: str) -> TokenIds:
        """Ids of what a message says; no control token and no added token can arise from it."""
        return self._remembered(text)

    @cached_property
    def _remembered(self) -> Callable[[str], TokenIds]:
        """`_tokenized`, with its latest answers kept: observations and tips come again and again."""
        return lru_cache(maxsize=10_000)(self._tokenized)

    def _tokenized(self, text: str) -> TokenIds:
        pieces = [text]
        for token in self._added_texts:
            pieces = [part for piece in pieces for part in _broken(piece, token)]
        return tuple(
            token_id
            for piece in pieces
            if piece
            for token_id in self.tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )

    @cached_property
    def _added_texts(self) -> list[str]:
        """Added tokens that `split_special_tokens` would still recognise: longer than a character, not blank."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [t.content for t in added if not t.special and len(t.content) > 1 and t.content.strip()]

    def _glue_ids(self, glue: str) -> TokenIds:
        if glue not in self._known_glue:
            self._known_glue[glue] = tuple(self.tokenizer(glue, add_special_tokens=False)["input_ids"])
        return self._known_glue[glue]

    @cached_property
    def _known_glue(self) -> dict[str, TokenIds]:
        return {}

    def _text(self, messages: Sequence[Message]) -> str:
        pairs = zip(messages, [*messages[1:], None], strict=True)
        return self.opening + "".join(message.text + self._after(message, following) for message, following in pairs)

    def conversation(self, messages: Sequence[Message]) -> TokenIds:
        """Ids of system, user, assistant, user, …, user, with a generation opened after the last one."""
        ids = self._glue_ids(self.opening)
        for message, following in zip(messages, [*messages[1:], None], strict=True):
            ids += self.text_ids(message.text) + self._glue_ids(self._after(message, following))
        return ids

    def _after(self, message: Message, following: Message | None) -> str:
        pair = (message.role, following.role if following else "assistant")
        glue = {
            ("system", "user"): self.system_to_user,
            ("user", "assistant"): self.user_to_assistant,
            ("assistant", "user"): self.assistant_to_user,
        }.get(pair)
        if glue is None:
            raise ValueError(f"a {pair[0]} message cannot be followed by a {pair[1]} message")
        return glue

    def next_turn(self, completion: TokenIds, user_text: str) -> TokenIds:
        """Ids that follow a completion: close it (unless it closed itself), say ``user_text``, open a generation."""
        glue = self._glue_ids(self.assistant_to_user)
        if completion and completion[-1] == self.closer:
            glue = glue[1:]
        return glue + self.text_ids(user_text) + self._glue_ids(self.user_to_assistant)

    def completion_text(self, token_ids: TokenIds) -> str:
        """What a completion says, without the token that ended it."""
        ids = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _broken(text: str, token: str) -> list[str]:
    """The text cut after the first character of every occurrence of ``token``, so that no piece holds it."""
    pieces = []
    while (found := text.find(token)) >= 0:
        pieces.append(text[: found + 1])
        text = text[found + 1 :]
    return [*pieces, text]
