"""Chat pieces against full renderings of real templates; text that looks like control tokens stays text."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empo2 import models
from empo2.chat import ChatFormat, Message
from empo2.errors import UsageError

#: Qwen2.5's, without its tool branches: a default system message where there is none.
QWEN = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'assistant') or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

#: Llama 3's: headers, a bos token of its own, blanks around a message trimmed.
LLAMA = """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif
%}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""

LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

#: What thinking models add: tokens that are not "special". The last one overlaps with itself, as OLMo's `|||…|||` do.
ADDED = ["<think>", "</think>", "|||IP|||"]


def tiny(kind: str):
    tokenizer = models.tiny_tokenizer()
    if kind == "qwen":
        tokenizer.chat_template = QWEN
    if kind == "llama":
        tokenizer.add_special_tokens(
            {"additional_special_tokens": LLAMA_TOKENS, "bos_token": LLAMA_TOKENS[0], "eos_token": LLAMA_TOKENS[1]}
        )
        tokenizer.chat_template = LLAMA
    tokenizer.add_tokens(ADDED)
    return tokenizer


TINY = {kind: ChatFormat.of(tiny(kind)) for kind in ("chatml", "qwen", "llama")}


def with_template(template: str) -> ChatFormat:
    tokenizer = tiny("chatml")
    tokenizer.chat_template = template
    return ChatFormat.of(tokenizer)


def rendered(chat: ChatFormat, messages: list[Message], *, opened: bool = True) -> tuple[int, ...]:
    """Ids of the tokenizer's own full rendering."""
    said = [{"role": message.role, "content": message.text} for message in messages]
    text = chat.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=opened)
    return tuple(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


def conversation(texts: list[str]) -> list[Message]:
    roles = ["system", *(["user", "assistant"] * len(texts))]
    return [Message(role=role, text=text) for role, text in zip(roles, texts, strict=False)]


FRAGMENTS = [
    "You",
    " are",
    "hall",
    " coin",
    ".",
    " ",
    "\n",
    "\n\n",
    "é",
    "日本",
    "🙂",
    "⟦1⟧",
    "'s",
    "12",
    "\t",
    "<",
    "|",
]
CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|im_", "end|>", "user\n", "|||", "IP", *LLAMA_TOKENS, *ADDED),
    *("<|endoftext|>", "<repo_name>", "</s>", "[INST]"),
]
words = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)
#: Blanks at a message's ends are left out: Llama 3 trims them, and "\n" + "\n\n…" merges in a full rendering.
plain_texts = words.map(str.strip).filter(bool)
wild_texts = st.lists(st.sampled_from(FRAGMENTS + CONTROL), max_size=10).map("".join)
conversations = st.integers(1, 3).flatmap(lambda n: st.lists(plain_texts, min_size=2 * n, max_size=2 * n))


def check_pieces_equal_the_rendering(chat: ChatFormat, texts: list[str], truncated: bool) -> None:
    """Turn by turn: a conversation grown by `next_turn` is the full rendering of all its messages."""
    messages = conversation(texts)
    assert chat.conversation(messages) == rendered(chat, messages)
    grown = chat.conversation(messages[:2])
    for answer, said in zip(messages[2::2], messages[3::2], strict=True):
        completion = chat.text_ids(answer.text) + (() if truncated else (chat.closer,))
        grown += completion + chat.next_turn(completion, said.text)
    assert grown == rendered(chat, messages)


def check_text_stays_text(chat: ChatFormat, text: str) -> None:
    added = set(chat.tokenizer.added_tokens_decoder)
    ids = chat.text_ids(text)
    assert not added & set(ids)
    assert chat.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", TINY)
@given(texts=conversations, truncated=st.booleans())
@settings(max_examples=60, deadline=None)
def test_pieces_equal_the_full_rendering(kind, texts, truncated):
    check_pieces_equal_the_rendering(TINY[kind], texts, truncated)


@pytest.mark.parametrize("kind", TINY)
@given(text=wild_texts)
@settings(max_examples=100, deadline=None)
def test_control_tokens_in_text_become_text(kind, text):
    check_text_stays_text(TINY[kind], text)


@pytest.mark.parametrize("token", [*ADDED, "<|im_end|>", "<|im_start|>"])
def test_repeated_and_overlapping_control_tokens_become_text(token):
    for text in (token, token * 3, token[:-1] + token, token + token[3:], token[:3] + token, f"a{token}b{token}"):
        check_text_stays_text(TINY["chatml"], text)


@pytest.mark.parametrize("kind", TINY)
@given(texts=st.lists(wild_texts, min_size=5, max_size=5))
@settings(max_examples=30, deadline=None)
def test_no_message_brings_a_control_token_into_the_conversation(kind, texts):
    """System, user and assistant texts, and the user text after a completion."""
    chat = TINY[kind]
    added = set(chat.tokenizer.added_tokens_decoder)

    def controls(said: list[str]) -> list[int]:
        ids = chat.conversation(conversation(said[:4])) + chat.next_turn((5, chat.closer), said[4])
        return [token_id for token_id in ids if token_id in added]

    assert controls(texts) == controls(["x"] * 5)


def test_chatml_in_words():
    chat = TINY["chatml"]
    said = [Message(role="system", text="Act."), Message(role="user", text="hall<|im_end|>")]
    prompt = chat.conversation(said)
    assert chat.tokenizer.decode(list(prompt)) == (
        "<|im_start|>system\nAct.<|im_end|>\n<|im_start|>user\nhall<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert list(prompt).count(chat.closer) == 2  # the third "<|im_end|>" is words of the user
    assert chat.closer == chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_ids == {chat.closer}


def test_a_model_may_end_with_its_eos_or_with_the_templates_closer():
    chat = TINY["llama"]
    ids = chat.tokenizer.convert_tokens_to_ids
    assert chat.closer == ids("<|eot_id|>")
    assert chat.stop_ids == {ids("<|eot_id|>"), ids("<|end_of_text|>")}
    said = chat.text_ids("take coin")
    for stop in chat.stop_ids:
        assert chat.completion_text((*said, stop)) == "take coin"
    assert chat.completion_text(said) == "take coin"
    assert chat.completion_text(()) == ""


def test_a_truncated_completion_is_closed_and_an_ended_one_not_twice():
    chat = TINY["chatml"]
    said = chat.text_ids("go north")
    truncated, ended = chat.next_turn(said, "hall"), chat.next_turn((*said, chat.closer), "hall")
    assert truncated == (chat.closer, *ended)
    assert chat.tokenizer.decode(list(ended)) == "\n<|im_start|>user\nhall<|im_end|>\n<|im_start|>assistant\n"
    assert chat.next_turn((), "hall") == truncated


def test_messages_out_of_order_are_refused():
    chat = TINY["chatml"]
    for roles in (("user", "user"), ("system", "assistant"), ("assistant", "assistant"), ("user", "assistant")):
        with pytest.raises(ValueError, match="cannot be followed by"):
            chat.conversation([Message(role=role, text="x") for role in roles])


EACH = "{% for message in messages %}"
LINE = "{{ '<|im_start|>' + message['role'] + '\\n' + TEXT + '<|im_end|>\\n' }}"
OPENED = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chatml_saying(text: str) -> str:
    """ChatML in which the jinja expression ``text`` stands for what a message says."""
    return EACH + LINE.replace("TEXT", text) + OPENED


def test_the_template_that_the_refused_ones_spoil_is_accepted():
    assert with_template(chatml_saying("message['content']")).opening == TINY["chatml"].opening


SAYS = "message['content']"
REFUSED = {
    "drops the system message": (
        "drops or reorders",
        "{% for message in messages if message['role'] != 'system' %}" + LINE.replace("TEXT", SAYS) + OPENED,
    ),
    "reorders": (
        "drops or reorders",
        "{% for message in messages | reverse %}" + LINE.replace("TEXT", SAYS) + OPENED,
    ),
    "drops past answers": (
        "drops or reorders",
        chatml_saying(f"({SAYS} if message['role'] != 'assistant' or loop.last else 'done')"),
    ),
    "thinks in the last answer only": (
        "history and a new generation differently",
        chatml_saying(f"('<think></think>' if message['role'] == 'assistant' and loop.last else '') + {SAYS}"),
    ),
    "opens a generation that thinks": (
        "history and a new generation differently",
        chatml_saying(SAYS).replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"),
    ),
    "opens no generation": (
        "history and a new generation differently",
        EACH + LINE.replace("TEXT", SAYS) + "{% endfor %}",
    ),
    "strips past reasoning": ("changes what messages say", chatml_saying(SAYS + ".split('</think>')[-1]")),
    "lowers capitals": ("changes what messages say", chatml_saying(SAYS + " | lower")),
    "joins lines": ("changes what messages say", chatml_saying(SAYS + " | replace('\\n', ' ')")),
    "refuses a system message": ("refuses .* No system here", "{{ raise_exception('No system here') }}"),
    "merges words across messages": (
        "merges text across the borders",
        EACH
        + "{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}"
        + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ),
}


@pytest.mark.parametrize(("reason", "template"), REFUSED.values(), ids=REFUSED)
def test_a_template_that_cannot_be_appended_to_is_refused(reason, template):
    with pytest.raises(UsageError, match=reason):
        with_template(template)


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_chat_template_is_refused(template):
    with pytest.raises(UsageError, match="no chat template"):
        with_template(template)


@pytest.mark.real
def test_smollm2():
    chat = ChatFormat.of(models.load_tokenizer(models.SMOLLM2))
    settled = partial(settings, max_examples=200, deadline=None)

    @settled()
    @given(texts=conversations, truncated=st.booleans())
    def pieces(texts, truncated):
        check_pieces_equal_the_rendering(chat, texts, truncated)

    @settled()
    @given(text=wild_texts)
    def text_stays_text(text):
        check_text_stays_text(chat, text)

    pieces()
    text_stays_text()
    chat.tokenizer.add_tokens(ADDED)
    chat = ChatFormat.of(chat.tokenizer)
    text_stays_text()
    assert chat.stop_ids == {chat.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert chat.tokenizer.pad_token_id in chat.stop_ids  # so padding could never be told by id
