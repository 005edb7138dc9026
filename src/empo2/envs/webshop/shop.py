"""One visit to WebShop: what a click and a search do, from page to page."""

import random
import re
from collections.abc import Sequence

from empo2.envs.webshop import pages
from empo2.envs.webshop.catalogue import Catalogue
from empo2.envs.webshop.goals import Goal
from empo2.envs.webshop.pages import ATTRIBUTES, PER_PAGE, SUB_PAGES
from empo2.envs.webshop.products import Product
from empo2.envs.webshop.reward import Reward

_ACTION = re.compile(r"(.+)\[(.+)\]")


def parsed(action: str) -> tuple[str, str] | None:
    """`search` or `click` and its argument in lower case; None for what is neither."""
    found = _ACTION.match(action)
    return (found[1], found[2].lower()) if found and found[1] in ("search", "click") else None


class Visit:
    """``page`` is what is seen; `act` changes it. ``bought``: the reward, once something is."""

    def __init__(self, catalogue: Catalogue, goal: Goal, rng: random.Random, *, attributes: bool = False) -> None:
        """``attributes``: items have a sub-page of their attributes, which the original hides by default."""
        self._catalogue, self._goal, self._rng = catalogue, goal, rng
        self._sub_pages = (*SUB_PAGES, *([ATTRIBUTES] if attributes else []))
        self.bought: Reward | None = None
        self.page: pages.Page
        self._on, self._keywords, self._product = "index", list[str](), 0
        self._chosen, self._visited = dict[str, str](), set[str]()
        self._back_to_search()

    def act(self, action: str) -> bool:
        """Whether the action was possible; else nothing happens."""
        name, argument = parsed(action) or ("", "")
        if self.bought is not None or not name:
            return False
        if name == "search":
            self._search(argument)
            return True
        if argument == "search" or argument not in self.page.clickables():
            return False
        self._click(argument)
        return True

    def possible(self) -> tuple[str, ...]:
        """What can be clicked, as actions, less names that no click can say; empty once something was bought."""
        actions = ((name, f"click[{name}]") for name in self.page.clickables() if name != "search")
        return tuple(action for name, action in actions if parsed(action) == ("click", name))

    def _search(self, text: str) -> None:
        self._keywords, self._number = text.split(" "), 1
        self._hits = self._catalogue.hits(text, self._rng)
        self._show_results()

    def _search_again(self) -> None:
        """Turning pages and going back search anew, which shows for `<r>` only: it draws other products."""
        if self._keywords[0] == "<r>":
            self._hits = self._catalogue.hits(" ".join(self._keywords), self._rng)
        self._show_results()

    def _click(self, name: str) -> None:
        kind = self.page.kind_of(name)
        if kind == "label":
            named = [option for option, values in self._seen().options.items() if name in values]
            self._chosen[named[-1]] = name
            self._show_item()
        elif kind == "link":
            self._product = next(
                place for place in self._shown() if self._catalogue.products[place].asin.lower() == name
            )
            self._visited.add(self._seen().asin)
            self._show_item()
        elif name == "back to search":
            self._back_to_search()
        elif name in ("next >", "< prev"):
            self._turn(1 if name == "next >" else -1)
        elif name == "buy now":
            self._buy()
        else:
            self._on = "sub-page"
            self.page = pages.sub_page(self._goal.text, self._seen(), name.title())

    def _turn(self, pages_on: int) -> None:
        """`Next >`, and `< Prev`, which leads from a sub-page to the item and from there back to its results."""
        if self._on == "sub-page":
            self._show_item()
            return
        if self._on == "results":
            self._number += pages_on
        self._search_again()

    def _buy(self) -> None:
        self.bought = self._catalogue.reward(self._goal, self._product, self._chosen.values())
        self.page = pages.done_page(self._seen().asin, self._chosen, self.bought.total)

    def _back_to_search(self) -> None:
        self._on, self._keywords, self._number, self._hits = "index", [], 1, list[int]()
        self._chosen, self._visited = {}, set()
        self.page = pages.index_page(self._goal.text)

    def _show_results(self) -> None:
        self._on, self._chosen = "results", {}
        shown = [self._catalogue.products[place] for place in self._shown()]
        self.page = pages.results_page(self._goal.text, shown, self._number, len(self._hits), frozenset(self._visited))

    def _show_item(self) -> None:
        self._on = "item"
        self.page = pages.item_page(self._goal.text, self._seen(), self._chosen, self._keywords, self._sub_pages)

    def _shown(self) -> Sequence[int]:
        """Places of the products on this page of results."""
        return self._hits[(self._number - 1) * PER_PAGE : self._number * PER_PAGE]

    def _seen(self) -> Product:
        return self._catalogue.products[self._product]
