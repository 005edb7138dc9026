"""WebShop's pages as sequences of text nodes, their clickables, and the forms in which an agent reads them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from empo2.envs.webshop.products import Product

Kind = Literal["text", "instruction", "button", "link", "label", "result"]
Form = Literal["text", "text_rich", "short"]
_CLICKED: tuple[Kind, ...] = "button", "link", "label"
PER_PAGE = 10  #: products on a page of results
SUB_PAGES = ("Description", "Features", "Reviews")
ATTRIBUTES = "Attributes"  #: a sub-page on request: what the reward compares with, category and query


@dataclass(frozen=True, slots=True)
class Node:
    """One text of a page. ``kind`` instruction and result: not in `short`.

    ``marked``: a visited link, or a label that the original takes for a chosen one; ``chosen``: one that is.
    """

    text: str
    kind: Kind = "text"
    marked: bool = False
    chosen: bool = False


@dataclass(frozen=True)
class Page:
    nodes: tuple[Node, ...]

    def kind_of(self, name: str) -> Kind:
        """What a click on a name reaches: a button before a link, a link before a label."""
        kinds = {node.kind for node in self.nodes if (node.text if node.kind == "label" else node.text.lower()) == name}
        return next(kind for kind in _CLICKED if kind in kinds)

    def clickables(self) -> list[str]:
        """What can be clicked: buttons, then links, then labels, each once."""
        found = [node.text.lower() for kind in ("button", "link") for node in self.nodes if node.kind == kind]
        found += [node.text for node in self.nodes if node.kind == "label"]
        return list(dict.fromkeys(found))

    def read(self, form: Form) -> str:
        """The observation. `text` and `text_rich` are the original's; `short` is `text` without the instruction, which
        every page repeats, with chosen options marked, and, after a purchase, without what was earned."""
        if form == "text_rich":
            return _rich(self._visible())
        if form == "text":
            return _plain(self._visible())
        told = [node for node in self._visible() if node.kind not in ("instruction", "result")]
        return _plain([Node(f"{node.text} (chosen)") if node.chosen else node for node in told])

    def _visible(self) -> list[Node]:
        """An empty text gives no node; one of blanks only becomes a blank, or none if it breaks the line."""
        return [
            node if node.text.strip(_BLANKS) else replace(node, text=" ")
            for node in self.nodes
            if node.text and (node.text.strip(_BLANKS) or "\n" not in node.text)
        ]


_BLANKS = " \t\n\r\f"


def _plain(nodes: Sequence[Node]) -> str:
    return " [SEP] ".join(node.text.strip() for node in nodes)


def _rich(nodes: Sequence[Node]) -> str:
    lines, chosen = "", ""
    for node in nodes:
        name = "clicked button" if node.marked else "button"
        boxed = f"[{name}] {node.text} [{name}_]"
        if node.kind == "label":
            lines += f"  {boxed}\n"
            if node.marked:
                chosen = f"You have clicked {node.text}.\n{chosen}"
        elif node.kind == "link":
            lines += f"\n{boxed}\n"
        else:
            lines += f"{boxed if node.kind == 'button' else node.text}\n"
    return chosen + lines


def _button(text: str) -> Node:
    return Node(text, "button")


def index_page(goal: str) -> Page:
    return Page((Node("WebShop"), *_instruction("Instruction: ", goal), _button("Search")))


def _head(goal: str, *, previous: bool) -> list[Node]:
    return [*_instruction("Instruction:", goal), _button("Back to Search"), *([_button("< Prev")] if previous else [])]


def _instruction(head: str, goal: str) -> tuple[Node, Node]:
    return Node(head, "instruction"), Node(goal, "instruction")


def results_page(goal: str, shown: Sequence[Product], number: int, total: int, visited: frozenset[str]) -> Page:
    """``shown``: the products of page ``number``, of ``total`` hits."""
    nodes = [*_head(goal, previous=False), Node(f"Page {number} (Total results: {total})")]
    nodes += [*([_button("< Prev")] if number > 1 else []), _button("Next >")]
    for product in shown:
        nodes += [Node(product.asin, "link", product.asin in visited), Node(product.title), Node(product.price_tag)]
    return Page(tuple(nodes))


def item_page(
    goal: str,
    product: Product,
    chosen: Mapping[str, str],
    keywords: Sequence[str],
    sub_pages: Sequence[str] = SUB_PAGES,
) -> Page:
    """``chosen``: option name → value; it stands in the page's address, where the original looks for labels."""
    nodes = _head(goal, previous=True)
    address = f"{'+'.join(keywords)}/{json.dumps(chosen)}"
    for name, values in product.options.items():
        nodes.append(Node(name))
        nodes += [Node(value, "label", f'"{value}"' in address, chosen.get(name) == value) for value in values]
    nodes += [Node(product.title), Node(f"Price: {product.price_tag}"), Node("Rating: N.A.")]
    return Page((*nodes, *map(_button, sub_pages), _button("Buy Now")))


def sub_page(goal: str, product: Product, name: str) -> Page:
    """``name``: of `SUB_PAGES`, or `ATTRIBUTES`."""
    told = {
        "Description": (product.description,),
        "Features": tuple(f" {bullet}" for bullet in product.bullets),
        ATTRIBUTES: (
            *(f" {attribute}" for attribute in product.attributes),
            product.category,
            product.query,
            product.product_category,
        ),
    }
    return Page((*_head(goal, previous=True), *map(Node, told.get(name, ()))))


def done_page(asin: str, chosen: Mapping[str, str], reward: float) -> Page:
    told = json.dumps(chosen, sort_keys=True)
    for sign in "<>&'":
        told = told.replace(sign, f"\\u{ord(sign):04x}")
    thanks = (
        "Thank you for shopping with us!",
        "Your code: ",
        "None",
        " (Paste it in your MTurk interface.)",
        "Purchased",
    )
    bought = "asin", asin, "options", told
    rest = [*"attrs None category None query None".split(), "product category", "None", "Target", "asin", "options"]
    rest += ["attrs", "price upper", "instuction text", "category", "product category", "query", "Goal ", "None"]
    score = "Reward", "Your score (min 0.0, max 1.0)", str(reward), "Reward Details ", "None"
    seen = [Node(text) for text in (*thanks[:1], *thanks[4:], *bought)]
    hidden = [Node(text, "result") for text in (*rest, *score)]
    return Page((seen[0], *(Node(text, "result") for text in thanks[1:4]), *seen[1:], *hidden))
