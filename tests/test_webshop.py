"""WebShop's engine on hand-made products, page by page, and on the real 1,000-product set where that is at hand.

The words and scores of Lucene were recorded from Anserini 0.38 (Lucene 9), DefaultEnglishAnalyzer, on 2026-11-29.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empo2.config import EnvConfig
from empo2.envs.base import suite_of
from empo2.envs.webshop import goals, pages, products
from empo2.envs.webshop.catalogue import Catalogue, in_memory
from empo2.envs.webshop.environment import WebShopSuite
from empo2.envs.webshop.generate import write_catalogue
from empo2.envs.webshop.kept import kept
from empo2.envs.webshop.reward import fuzzy, type_score
from empo2.envs.webshop.search import Postings, rounded_length, terms
from empo2.envs.webshop.shop import Visit, parsed
from empo2.errors import UsageError
from empo2.types import Task

REAL = os.environ.get("EMPO2_WEBSHOP_DATA")
TABLE = "Home › Furniture › Tables"


def entry(asin, name="Oak Coffee Table", **fields):
    """A product as the official file has it."""
    return {
        "asin": asin,
        "name": name,
        "full_description": "A table.",
        "small_description": ["Solid wood."],
        "pricing": "$24.99",
        "query": " Coffee Tables ",
        "category": "garden",
        "product_category": TABLE,
        "customization_options": "",
        **fields,
    }


def values(*names):
    return [{"value": name, "asin": "x"} for name in names]


ENTRIES = [
    entry(
        "B01",
        pricing="$20.00$30.5",
        customization_options={"Color": values(" Light Blue ", "Black/White"), "size": values("S", "M")},
    ),
    entry("B02", "", full_description="", small_description="", pricing=""),
    entry("B01", "the second of this asin is passed over"),
    entry("B0345678901", "its asin is too long"),
    entry("nan", "no asin"),
    entry(
        "B03",
        "Café <b>Lamp</b> &amp;  shade",
        full_description="A light.",
        small_description=["", " \n ", "two  blanks\u00a0"],
        pricing="$1,299",
        query="lamps",
        product_category="Home › Lighting",
        customization_options={
            "Colour": values("Red", "RED"),
            "none": None,
            "a": values("same", "é", 'say "so"'),
            "b": values("same"),
            "COLOUR": values("Blue"),
        },
    ),
    entry("B04", "Pine Coffee Table", pricing="$985.00"),
]
INSTRUCTIONS = {
    "B01": {
        "attributes": ["solid wood", "easy assemble"],
        "instruction": "Find me solid wood coffee tables",
        "instruction_attributes": ["solid wood"],
    },
    "B02": {"attributes": ["soft"], "instruction": None},
    "B03": {"attributes": ["bright"]},
    "B04": {
        "attributes": ["solid wood"],
        "instruction": "Find me pine tables",
        "instruction_attributes": ["solid wood", "pine"],
    },
}
HUMAN = {
    "B01": [
        {"instruction": "..a blue table.", "instruction_attributes": ["solid wood"], "instruction_options": ["blue"]},
        {"instruction": "no attributes", "instruction_attributes": [], "instruction_options": []},
    ]
}


def write(folder, entries=ENTRIES, instructions=INSTRUCTIONS, human=HUMAN):
    for name, content in (("items_shuffle", entries), ("items_ins_v2", instructions), ("items_human_ins", human)):
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("catalogue"))


@pytest.fixture(scope="module")
def listed(folder):
    return list(products.read_products(folder))


@pytest.fixture(scope="module")
def shop(listed):
    return Catalogue(in_memory(listed), seed=1)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EMPO2_CACHE", str(tmp_path / "cache"))


def visit(shop, *actions, goal=None):
    made = Visit(shop, goal or shop.goals[0], random.Random(0))
    for action in actions:
        assert made.act(action), action
    return made


# Loading


def test_products_as_the_original_reads_them(listed):
    assert [product.asin for product in listed] == ["B01", "B02", "B03", "B04"]
    first, second, third, _ = listed
    assert first.options == {"color": ("light blue", "black | white"), "size": ("s", "m")}
    assert (first.prices, first.price_tag, first.query) == ((20.0, 30.5), "$20.0 to $30.5", "coffee tables")
    assert (second.prices, second.price_tag, second.bullets, second.title) == ((100.0,), "$100.0", ("",), "")
    assert (second.instruction, second.attributes, goals.num_synthetic(second)) == (None, ("soft",), 0)
    assert third.options == {"colour": ("blue",), "a": ("same", "é", 'say "so"'), "b": ("same",)}
    assert list(third.options) == ["colour", "a", "b"]
    assert (third.prices, third.price_tag) == ((1299.0,), "$1299.0")


@pytest.mark.parametrize(
    ("pricing", "prices", "tag"),
    [
        ("$1,299.00", (1299.0,), "$1299.0"),
        ("was $5 now $4.50 or $3", (5.0, 4.5), "$5.0 to $4.5"),
        ("12$7", (7.0,), "$7.0"),
        ("", (100.0,), "$100.0"),
        ("$٣.٥", (3.5,), "$3.5"),
    ],
)
def test_prices(tmp_path, pricing, prices, tag):
    (product,) = products.read_products(write(tmp_path, [entry("B01", pricing=pricing)], {"B01": {}}, {}))
    assert (product.prices, product.price_tag) == (prices, tag)


def test_a_product_without_instructions_has_a_dummy_attribute(tmp_path):
    (product,) = products.read_products(write(tmp_path, [entry("B09")], {}, {}))
    assert (product.attributes, product.instruction, product.human) == (("DUMMY_ATTR",), None, ())


def test_a_limit_counts_entries(folder):
    assert [product.asin for product in products.read_products(folder, limit=4)] == ["B01", "B02"]


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([{"asin": "B01"}], r"items_shuffle.json: product 0 \(B01\): \w+ is missing"),
        ([entry("B01"), entry("B02", pricing=3)], r"product 1 \(B02\): pricing must be a text, not a number"),
        ([entry("B01", name=None)], r"product 0 \(B01\): name must be a text, not null"),
        ([entry("B01", pricing="cheap")], r"pricing holds no price after a \$: 'cheap'"),
        ([entry("B01", pricing="$1.2.3")], "pricing holds no price"),
        ([entry("B01", small_description=[1])], "small_description must be a list of texts"),
        ([entry("B01", customization_options=[1])], "customization_options must be an object or an empty text"),
        ([entry("B01", customization_options={"a": "b"})], r"customization_options\['a'\] must be a list"),
        ([entry("B01", customization_options={"a": [{"v": 1}]})], "must hold objects with a text `value`"),
        ([["B01"]], "product 0 must be an object, not a list"),
        (json.dumps([entry("B01"), entry("B02")])[:-20], "product 1 is not valid JSON .* is the file cut off"),
        ('{"a": 1}', "must hold a list of products"),
    ],
)
def test_malformed_products_are_named(tmp_path, entries, told):
    with pytest.raises(UsageError, match=told):
        list(products.read_products(write(tmp_path, entries)))


def test_malformed_instructions_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"items_ins_v2.json: B01: attributes must be a list of texts"):
        list(products.read_products(write(tmp_path, [entry("B01")], {"B01": {"attributes": "soft"}})))
    with pytest.raises(UsageError, match=r"items_human_ins.json: B01, instruction 0: instruction is missing"):
        list(products.read_products(write(tmp_path, [entry("B01")], {}, {"B01": [{}]})))
    with pytest.raises(UsageError, match=r"items_ins_v2.json is not valid JSON"):
        list(products.read_products(write(tmp_path, [entry("B01")], '{"B01": ')))


def test_a_folder_without_the_files_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"has no file items_ins_v2\*.json"):
        list(products.read_products(tmp_path))


def test_a_file_larger_than_what_is_read_at_once(folder, listed, monkeypatch):
    monkeypatch.setattr(products, "READ_AT_ONCE", 7)
    assert list(products.read_products(folder)) == listed


# Prices and goals


def test_what_is_drawn_in_the_original_order(shop):
    rng = random.Random(1)
    price = rng.uniform(20.0, 30.5)
    assert shop.prices == [price, 100.0, 1299.0, 985.0]
    above = [tens * 10.0 for tens in range(1, 100) if tens * 10.0 > price][:4]
    limit = max(rng.sample(above, 2))
    assert {goal.limit for goal in shop.goals if goal.place == 0} == {limit}
    (last,) = [goal for goal in shop.goals if goal.place == 3]
    assert (last.limit, last.text) == (1_000_000, "Find me pine tables")


def test_goals_are_all_combinations_shuffled(shop):
    made = [
        "Find me solid wood coffee tables with color: light blue, and size: s",
        "Find me solid wood coffee tables with color: light blue, and size: m",
        "Find me solid wood coffee tables with color: black | white, and size: s",
        "Find me solid wood coffee tables with color: black | white, and size: m",
        "Find me pine tables",
    ]
    random.Random(233).shuffle(made)
    assert [goal.text.partition(", and price")[0] for goal in shop.goals] == made
    assert all(
        goal.text.endswith(f", and price lower than {goal.limit:.2f} dollars") for goal in shop.goals if not goal.place
    )


def test_goals_of_people(listed):
    (goal,) = Catalogue(in_memory(listed), seed=1, human=True).goals
    assert goal.text.startswith("a blue table, and price lower than ")
    assert (goal.attributes, goal.options) == (("solid wood",), ("blue",))


def test_an_empty_list_of_values_has_no_goal_but_draws(listed):
    (product,) = [product for product in listed if product.asin == "B01"]
    assert goals.num_synthetic(product) == 4
    empty = replace(product, options={"color": ()})
    both = Catalogue(in_memory([empty, product]), seed=5)
    assert len(both.goals) == 4
    rng = random.Random(5)
    drawn = [rng.uniform(*product.prices) for _ in range(2)]
    assert [goals.draw_limit(price, rng) for price in drawn][1] == both.goals[0].limit


@pytest.mark.parametrize(
    ("price", "considered"), [(5.0, [10, 20, 30, 40]), (10.0, [20, 30, 40, 50]), (965.0, [970, 980, 990])]
)
def test_limits_lie_strictly_above_the_price(price, considered):
    assert {goals.draw_limit(price, random.Random(seed)) for seed in range(200)} == set(considered[1:])


def test_no_limit_where_fewer_than_two_lie_above():
    rng = random.Random(0)
    before = rng.getstate()
    assert goals.draw_limit(980.0, rng) == 1_000_000
    assert rng.getstate() == before


def test_limited_goals_are_drawn_one_too_high():
    found = {goals.limited([1.0, 0.0, 5.0], 1, random.Random(seed))[0] for seed in range(200)}
    assert found == {1, 2}


def test_more_goals_than_can_be_drawn():
    assert sorted(goals.limited([1.0, 0.0, 5.0, 0.0], 2, random.Random(0))) == [1, 3]
    with pytest.raises(UsageError, match=r"only 2 of 4 goals can be drawn, not 3; set env\.limit_goals"):
        goals.limited([1.0, 0.0, 5.0, 0.0], 3, random.Random(0))


def test_limited_goals_are_the_originals(listed):
    """Written anew from the rules: reseeded with 233, shuffled, then drawn by weights until there are enough."""
    every = Catalogue(in_memory(listed), seed=1)
    counts = Counter(name for goal in every.goals for name in goal.attributes)
    weights = [sum(1 / counts[name] for name in goal.attributes) / len(goal.attributes) for goal in every.goals]
    rng = random.Random(233)
    rng.shuffle(list(range(len(weights))))
    sums = [sum(weights[:end]) for end in range(len(weights) + 1)]
    wanted: list[int] = []
    while len(wanted) < 3:
        drawn = rng.uniform(0, sums[-1])
        at = min(sum(value <= drawn for value in sums), len(sums) - 2)
        if at not in wanted:
            wanted.append(at)
    limited = Catalogue(in_memory(listed), seed=1, limit_goals=3)
    assert list(limited.goals) == [every.goals[goal] for goal in wanted]
    assert len(Catalogue(in_memory(listed), seed=1, limit_goals=len(weights)).goals) == len(weights)


def test_the_setting_limits_the_goals(folder):
    made = suite_of(EnvConfig(name="webshop", tasks=["synthetic"], catalogue=str(folder), limit_goals=2))
    assert made.variations("synthetic", "test") == (0, 1)


def test_weights_of_goals():
    assert goals.weights([("a", "b"), ("a",), ()], [2, 1, 1]) == [(1 / 3 + 1 / 2) / 2, 1 / 3, 0.0]
    assert goals.weights([("a",)], [0]) == [0.0]


# Actions


@pytest.mark.parametrize(
    ("action", "found"),
    [
        ("search[Blue Table]", ("search", "blue table")),
        ("click[ x ]", ("click", " x ")),
        ("search[ ]", ("search", " ")),
        ("search[]", None),
        ("Search[x]", None),
        (" search[x]", None),
        ("I search[x]", None),
        ("search[x] and more", ("search", "x")),
        ("search[a]\nclick[b]", ("search", "a")),
        ("search[a [b]]", None),
        ("search[a] click[b]", None),
        ("", None),
        ("search" + "[" * 100, None),
    ],
)
def test_actions(action, found):
    assert parsed(action) == found


def test_clickables_of_each_page(shop):
    goal = shop.goals[0]
    assert visit(shop).page.clickables() == ["search"]
    results = visit(shop, "search[oak coffee table]")
    assert results.page.clickables() == ["back to search", "next >", "b01", "b04"]
    results.act("click[next >]")
    assert results.page.clickables() == ["back to search", "< prev", "next >"]
    item = visit(shop, "search[oak coffee table]", "click[b01]")
    head = ["back to search", "< prev", "description", "features", "reviews", "buy now"]
    assert item.page.clickables() == [*head, "light blue", "black | white", "s", "m"]
    item.act("click[features]")
    assert item.page.clickables() == ["back to search", "< prev"]
    lamp = visit(shop, "search[lamp]", "click[b03]", goal=goal)
    assert lamp.page.clickables() == [*head, "blue", "same", "é", 'say "so"']
    lamp.act("click[buy now]")
    assert lamp.page.clickables() == []


def test_what_cannot_be_clicked_changes_nothing(shop):
    made = visit(shop, "search[oak coffee table]")
    before = made.page
    for action in (
        "click[search]",
        "click[B99]",
        "click[buy now]",
        "",
        "x" * 100_000,
        "\x00\x07",
        "click[description]",
    ):
        assert not made.act(action)
        assert made.page is before
    assert made.act("click[B01]")


def test_pages_and_what_they_forget(shop):
    made = visit(shop, "search[oak coffee table]", "click[b01]", "click[light blue]", "click[description]")
    assert made.page.read("text").endswith("[SEP] A table.")
    made.act("click[< prev]")
    assert "[clicked button] light blue [clicked button_]" in made.page.read("text_rich")
    made.act("click[< prev]")
    assert "[clicked button] B01 [clicked button_]" in made.page.read("text_rich")
    made.act("click[b01]")
    assert "You have clicked" not in made.page.read("text_rich")
    made.act("click[< prev]")
    made.act("search[table]")
    assert "[clicked button] B01 [clicked button_]" in made.page.read("text_rich")
    made.act("click[back to search]")
    made.act("search[table]")
    assert "[button] B01 [button_]" in made.page.read("text_rich")


def test_a_value_of_two_options_sets_the_last(shop):
    made = visit(shop, "search[lamp]", "click[b03]", "click[same]", "click[buy now]")
    assert ' [SEP] {"b": "same"} [SEP] ' in made.page.read("text")


def test_previous_comes_back_to_the_page_of_results(listed):
    many = Catalogue(in_memory([*listed, *(_copy(listed[0], f"C{n:02}") for n in range(25))]), seed=0)
    made = visit(many, "search[coffee]", "click[next >]", "click[next >]")
    last = made.page
    assert "Page 3 (Total results: 27)" in last.read("text")
    asin = made.page.clickables()[-1]
    made.act(f"click[{asin}]")
    made.act("click[< prev]")
    assert "Page 3 (Total results: 27)" in made.page.read("text")
    made.act("click[< prev]")
    assert "Page 2 (Total results: 27)" in made.page.read("text")


def _copy(product, asin):
    return replace(product, asin=asin)


# Observations


def test_text(shop):
    goal = next(goal for goal in shop.goals if goal.place == 3)
    made = visit(shop, goal=goal)
    assert made.page.read("text") == "WebShop [SEP] Instruction: [SEP] Find me pine tables [SEP] Search"
    made.act("search[oak coffee table]")
    assert made.page.read("text") == (
        "Instruction: [SEP] Find me pine tables [SEP] Back to Search [SEP] Page 1 (Total results: 2) [SEP] Next > "
        "[SEP] B01 [SEP] Oak Coffee Table [SEP] $20.0 to $30.5 [SEP] B04 [SEP] Pine Coffee Table [SEP] $985.0"
    )
    made.act("click[b01]")
    assert made.page.read("text") == (
        "Instruction: [SEP] Find me pine tables [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] light blue [SEP] "
        "black | white [SEP] size [SEP] s [SEP] m [SEP] Oak Coffee Table [SEP] Price: $20.0 to $30.5 [SEP] "
        "Rating: N.A. [SEP] Description [SEP] Features [SEP] Reviews [SEP] Buy Now"
    )
    assert made.page.read("short").startswith("Back to Search [SEP] < Prev [SEP] color [SEP] light blue [SEP] black")
    made.act("click[light blue]")
    assert "light blue (chosen) [SEP] black | white [SEP]" in made.page.read("short")
    assert "(chosen)" not in made.page.read("text")


def test_text_rich(shop):
    goal = next(goal for goal in shop.goals if goal.place == 3)
    made = visit(shop, "search[oak coffee table]", "click[b01]", "click[s]", "click[light blue]", goal=goal)
    assert made.page.read("text_rich") == (
        "You have clicked s.\nYou have clicked light blue.\n"
        "Instruction:\nFind me pine tables\n[button] Back to Search [button_]\n[button] < Prev [button_]\n"
        "color\n  [clicked button] light blue [clicked button_]\n  [button] black | white [button_]\n"
        "size\n  [clicked button] s [clicked button_]\n  [button] m [button_]\n"
        "Oak Coffee Table\nPrice: $20.0 to $30.5\nRating: N.A.\n[button] Description [button_]\n"
        "[button] Features [button_]\n[button] Reviews [button_]\n[button] Buy Now [button_]\n"
    )
    made.act("click[< prev]")
    assert made.page.read("text_rich") == (
        "Instruction:\nFind me pine tables\n[button] Back to Search [button_]\nPage 1 (Total results: 2)\n"
        "[button] Next > [button_]\n\n[clicked button] B01 [clicked button_]\nOak Coffee Table\n$20.0 to $30.5\n\n"
        "[button] B04 [button_]\nPine Coffee Table\n$985.0\n"
    )


def test_blank_nodes(shop):
    """An empty text gives no node, a blank bullet a blank one; a bullet that breaks the line begins with a blank."""
    made = visit(shop, "search[lamp]", "click[b03]", "click[features]")
    assert made.page.read("text").endswith("< Prev [SEP]  [SEP] two  blanks")
    assert made.page.read("text_rich").endswith("[button] < Prev [button_]\n \n two  blanks\u00a0\n")
    empty = visit(shop, "search[<q> coffee tables]", "click[b02]")
    assert "B02" not in empty.page.read("text")
    assert " [SEP] < Prev [SEP] Price: $100.0 [SEP] " in empty.page.read("text")
    empty.act("click[description]")
    assert empty.page.read("text").endswith("[SEP] < Prev")


def test_which_values_show_as_chosen(shop):
    """The original looks for them in quotes in the address: not those with other letters or quotes, but all that are
    called alike, also a chosen option's name, and a search for one in quotes."""
    made = visit(shop, "search[lamp]", "click[b03]", "click[é]")
    assert "[clicked button]" not in made.page.read("text_rich")
    made.act('click[say "so"]')
    assert "[clicked button]" not in made.page.read("text_rich")
    made.act("click[same]")
    assert made.page.read("text_rich").startswith("You have clicked same.\nYou have clicked same.\nInstruction:")
    asked = visit(shop, 'search["blue" lamp]', "click[b03]")
    assert asked.page.read("text_rich").startswith("You have clicked blue.\nInstruction:")


def test_the_done_page():
    page = pages.done_page("B01", {"b": "<x>", "a": "é'&"}, 0.75)
    assert page.read("text") == (
        "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk interface.) [SEP] "
        "Purchased [SEP] asin [SEP] B01 [SEP] options [SEP] "
        '{"a": "\\u00e9\\u0027\\u0026", "b": "\\u003cx\\u003e"} [SEP] attrs [SEP] None [SEP] category [SEP] None [SEP] '
        "query [SEP] None [SEP] product category [SEP] None [SEP] Target [SEP] asin [SEP] options [SEP] attrs [SEP] "
        "price upper [SEP] instuction text [SEP] category [SEP] product category [SEP] query [SEP] Goal [SEP] None "
        "[SEP] Reward [SEP] Your score (min 0.0, max 1.0) [SEP] 0.75 [SEP] Reward Details [SEP] None"
    )
    assert "0.75" not in page.read("short")
    assert page.read("text_rich").startswith("Thank you for shopping with us!\nYour code: \nNone\n (Paste it")


# Search

WORDS = [
    ("The women's running shoes, size 7.5 (wide)", "women run shoe size 7.5 wide"),
    ("USB-C to 3.5mm adapter; 1,000 cycles & 2:1", "usb c 3.5mm adapt 1,000 cycl 2 1"),
    ("O'Neill’s T-shirt U.S.A. v-neck x-large", "o'neil t shirt u.s.a v neck x larg"),
    ("possibly visibly nobly assembly assemblies ably", "possibl visibl nobli assembl assembl abli"),
    ("biology technology technologies apologies", "biologi technolog technolog apolog"),
    ("★ best ☆ gift ❤️ 👩‍🚀 ™ № 5 ½ cup", "★ best gift ❤️ 👩‍🚀 ™ 5 cup"),
    ("foo_bar a.b.c 1.2.3 a:b 1:2 c'd 5'6\"", "foo_bar a.b.c 1.2.3 a:b 1 2 c'd 5'6"),
    ("日本語 カタカナ ひらがな text", "日 本 語 カタカナ ひ ら が な text"),
    ("generalizations happiness hopping skies dying as is", "gener happi hop ski dy"),
]


@pytest.mark.parametrize(("text", "words"), WORDS)
def test_words_as_lucene_has_them(text, words):
    assert terms(text) == words.split()


def test_lengths_as_lucene_keeps_them():
    assert [rounded_length(n) for n in (0, 39, 40, 41, 42, 55, 56, 57, 58, 1000)] == [
        0,
        39,
        40,
        40,
        42,
        54,
        56,
        56,
        56,
        984,
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("the of", []),
        ("zzz", []),
        ("PINE", [3]),
        ("tables", [0, 1, 3]),
        ("light", [2, 0]),
        ("solid wood", [3, 0]),
    ],
)
def test_search(listed, text, found):
    """The second product has no text at all but its category is not searched, so it is never found."""
    postings = Postings()
    for product in listed:
        postings.add(product)
    assert sorted(postings.index().search(text)) == sorted(place for place in found if place != 1)


def test_at_most_50_hits_ties_in_the_catalogue_s_order(listed):
    postings = Postings()
    for number in range(60):
        postings.add(_copy(listed[3], f"C{number}"))
    assert postings.index().search("pine") == list(range(50))


def test_special_searches(shop):
    rng = random.Random(0)
    assert sorted(shop.hits("<r>", rng)) == [0, 1, 2, 3]
    assert shop.hits("<q> lamps", rng) == [2]
    assert shop.hits("<c> garden", rng) == [0, 1, 2, 3]
    for nothing in ("<c>", "<c> a b", "<a>", "<a> wood", "<q> nothing"):
        assert shop.hits(nothing, rng) == []


# Reward


def goal_of(shop, place, **fields):
    return replace(next(goal for goal in shop.goals if goal.place == place), **fields)


def test_the_right_purchase_is_worth_one(shop):
    goal = next(goal for goal in shop.goals if goal.place == 0)
    clicks = [f"click[{value}]" for value in goal.options.values()]
    made = visit(shop, "search[oak coffee table]", "click[b01]", *clicks, "click[buy now]", goal=goal)
    assert made.bought.total == 1.0
    assert not made.act("search[again]")


def test_parts_of_the_reward(shop):
    goal = goal_of(shop, 0, options={"color": "light blue", "size": "m"})
    found = shop.reward(goal, 0, ["light blue"])
    assert (found.attributes, found.options, found.price, found.type) == (1.0, 0.5, True, 1.0)
    assert found.total == 3 / 4
    other = shop.reward(goal, 3, [])
    assert (other.attributes, other.options, other.price, other.type) == (1.0, 0.0, False, 1.0)
    assert other.total == 1 / 4
    assert shop.reward(goal, 2, []).total == 0.0


def test_an_attribute_may_stand_in_a_text_of_the_product(shop):
    assert shop.reward(goal_of(shop, 3, attributes=("coffee t",)), 3, []).attributes == 1.0
    assert shop.reward(goal_of(shop, 3, attributes=("Coffee T",)), 3, []).attributes == 0.0  # as written, not lowered
    assert shop.reward(goal_of(shop, 3, attributes=("velvet",)), 3, []).attributes == 0.0


def test_bullets_are_joined_by_a_blank(listed):
    two = [replace(listed[3], bullets=("Set of two", "Chairs not included"))]
    shop = Catalogue(in_memory(two), seed=1)
    assert shop.reward(goal_of(shop, 0, attributes=("two chairs",)), 0, []).attributes == 1.0
    assert shop.reward(goal_of(shop, 0, attributes=("twochairs",)), 0, []).attributes == 0.0


@pytest.mark.parametrize(
    ("chosen", "score", "hit"),
    [("bcbbbacdcabbab", 86, 1.0), ("abadbcabaaaca", 85, 0.0)],
)
def test_a_hit_is_a_score_above_85(shop, chosen, score, hit):
    asked = {86: "bcbbbacdaabbaa", 85: "abaddcabaaaba"}[score]
    assert fuzzy(asked, chosen) == score
    assert shop.reward(goal_of(shop, 0, options=(asked,)), 0, [chosen]).options == hit


def test_no_options_asked_for(shop):
    assert shop.reward(goal_of(shop, 3), 3, ["anything"]).options is None


def test_the_quirk_of_colours_and_its_repair(shop, listed):
    """A goal's pair of name and value is a colour only if one of them is: `228black` is never hit by itself."""
    goal = goal_of(shop, 0, options={"color": "228black"})
    assert shop.reward(goal, 0, ["228black"]).options == 0.0
    fixed = Catalogue(in_memory(listed), seed=1, fixed=True)
    assert fixed.reward(goal, 0, ["228black"]).options == 1.0
    assert shop.reward(goal_of(shop, 0, options=("dark blue",)), 0, ["light blue"]).options == 1.0
    assert shop.reward(goal_of(shop, 0, options={"size": "m"}), 0, ["m"]).options == 1.0


@pytest.mark.parametrize(
    ("one", "other", "score"),
    [
        ("Solid Wood", "wood, solid!", 100),
        ("a b", "a b c", 100),
        ("", "a", 0),
        ("wood", "steel", 0),
        ("é", "e", 0),
        ("naïve", "nave", 100),
        ("a_b", "a b", 100),
    ],
)
def test_fuzzy_scores(one, other, score):
    assert fuzzy(one, other) == score


@pytest.mark.parametrize(
    ("shared_query", "category", "bought", "asked", "kind"),
    [
        (True, TABLE, ("oak", "table"), ("table",), 1.0),
        (False, "a › b", ("table",), ("table", "table", "oak", "lamp"), 1.0),
        (False, "a › b", ("x", "lamp"), ("a", "b", "c", "d", "lamp"), 0.5),
        (True, TABLE, ("lamp",), (*"abcdefghij", "lamp"), 0.1),
        (True, TABLE, ("lamp",), ("table",), 0.0),
        (False, "Home › Furniture › Beds", ("lamp",), ("a", "b", "c", "d", "lamp"), 1.0),
        (False, "a › b", (), (), 0.5),
        (True, TABLE, (), (), 1.0),
        (True, TABLE, (), ("table",), 0.0),
    ],
)
def test_types(listed, shared_query, category, bought, asked, kind):
    other = replace(listed[0], query=listed[0].query if shared_query else "beds", product_category=category)
    assert type_score(other, listed[0], bought, asked) == kind


# Kept on disk, made up


def test_the_kept_catalogue_is_the_one_read(folder, shop, monkeypatch):
    first, about = kept(folder)
    monkeypatch.setattr("empo2.envs.webshop.kept.read_products", None)  # not read again
    second, again = kept(folder)
    assert about == again
    assert about.num_products == 4
    for parts in (first, second):
        found = Catalogue(parts, seed=1)
        assert list(found.products) == list(shop.products)
        assert list(found.goals) == list(shop.goals)
        assert found.prices == shop.prices
        assert found.hits("coffee tables with drawers", random.Random(0)) == shop.hits("coffee table", random.Random(0))


def test_a_changed_file_is_indexed_anew(tmp_path):
    write(tmp_path)
    kept(tmp_path)
    write(tmp_path, [*ENTRIES, entry("B05")])
    assert kept(tmp_path)[1].num_products == 5


def test_a_broken_catalogue_leaves_nothing_in_the_cache(tmp_path):
    with pytest.raises(UsageError, match="cut off"):
        kept(write(tmp_path, json.dumps(ENTRIES)[:-5]))
    assert not list((tmp_path / "cache" / "webshop").iterdir())


def test_a_catalogue_without_products_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"items_shuffle.json holds no product"):
        kept(write(tmp_path, []))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[A B]", "product 1 is not valid JSON (there is no comma before it)"),
        ("[A, B] more", "goes on after the list of products"),
        ("[A, B]]", "goes on after the list of products"),
        ("[A,, B]", "product 1 is not valid JSON"),
        ("[A, B,]", "product 2 is not valid JSON"),
        ("[, A]", "product 0 is not valid JSON"),
        ("[A, B", "is the file cut off?"),
        ("[A, B,", "is the file cut off?"),
    ],
)
@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_a_list_that_is_no_json_is_refused(tmp_path, monkeypatch, text, told, at_once):
    monkeypatch.setattr(products, "READ_AT_ONCE", at_once)
    text = text.replace("A", json.dumps(entry("B01"))).replace("B", json.dumps(entry("X02")), 0)
    text = text.replace(" B", " " + json.dumps(entry("B02")))
    with pytest.raises(UsageError, match=re.escape(told)):
        list(products.read_products(write(tmp_path, text)))


def test_blanks_and_line_ends_around_products(tmp_path):
    text = f"\n [ \n{json.dumps(entry('B01'))}\n , \t{json.dumps(entry('B02'))} \n] \n"
    assert [product.asin for product in products.read_products(write(tmp_path, text))] == ["B01", "B02"]
    assert list(products.read_products(write(tmp_path, " [ ] "))) == []


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    write(tmp_path)
    path = next(tmp_path.glob("items_shuffle*.json"))
    path.write_bytes(path.read_bytes().replace(b"a", b"\xff\xfe", 1))
    with pytest.raises(UsageError, match=r"items_shuffle.*json is not in UTF-8"):
        kept(tmp_path)


def test_no_worked_example_where_the_purchase_is_worth_less_than_1(tmp_path):
    """An option that holds a bracket cannot be clicked, and a goal whose option the reward cannot see stays below 1."""
    environment = WebShopSuite(catalogue=str(write(tmp_path))).open()
    goods = WebShopSuite(catalogue=str(tmp_path)).goods("synthetic")
    solved = {}
    for variation, goal in enumerate(goods.goals):
        example = environment.worked_example(Task(environment="webshop", name="synthetic", variation=variation))
        solved[goal.text] = example is not None
        if example:
            assert example.turns[-1][1] == "click[buy now]"
    assert True in solved.values()
    bracketed = [entry("B07", customization_options={"size": [{"value": "[small]"}]})]
    folder = tmp_path / "bracketed"
    folder.mkdir()
    write(folder, bracketed, {"B07": INSTRUCTIONS["B01"]}, {})
    suite = WebShopSuite(catalogue=str(folder))
    assert len(suite.goods("synthetic").goals) == 1
    assert suite.open().worked_example(Task(environment="webshop", name="synthetic", variation=0)) is None


def test_attributes_on_request(shop):
    """As the original's show_attrs: a button before Buy Now, a sub-page, and the way back."""
    goal = shop.goals[0]
    plain, shown = (Visit(shop, goal, random.Random(0), attributes=attributes) for attributes in (False, True))
    for visit in (plain, shown):
        visit.act("search[oak coffee table]")
        visit.act(visit.possible()[-1])
    assert not plain.act("click[attributes]")
    names = [name for name in shown.page.clickables() if name not in plain.page.clickables()]
    assert names == ["attributes"]
    assert shown.page.clickables().index("attributes") == shown.page.clickables().index("buy now") - 1
    product = shop.products[shown._product]
    assert shown.act("click[attributes]")
    told = [*product.attributes, product.category, product.query, product.product_category]
    assert shown.page.read("text").split(" [SEP] ")[4:] == told
    assert shown.act("click[< prev]")
    assert "attributes" in shown.page.clickables()


def shop_of(*entries):
    """A catalogue of these entries, each asked for in a goal."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {fields["asin"]: INSTRUCTIONS["B01"] for fields in entries}
        return Catalogue(in_memory(list(products.read_products(write(Path(folder), entries, asked, {})))), seed=0)


BUTTONS = {
    "act": values("buy now", "description", "back to search", "< prev", "z"),
    "next": values("next >"),
    "odd": values("", "x [y]", "[x]", "a\nb"),
}


def test_a_button_is_clicked_before_an_option_of_its_name():
    item = visit(shop_of(entry("B01", customization_options=BUTTONS)), "search[table]", "click[b01]")
    assert item.act("click[next >]")
    assert item._chosen == {"next": "next >"}
    assert item.act("click[description]")
    assert item.page.read("text").endswith("A table.")
    assert item.act("click[< prev]")
    assert item.act("click[buy now]")
    assert item.bought is not None


def test_a_products_code_that_is_the_name_of_another_pages_button():
    shop = shop_of(entry("B01"), entry("buy now"), entry("features"), entry("next >"))
    for asin, expected in (("buy now", "buy now"), ("features", "features")):
        item = visit(shop, "search[table]", f"click[{asin}]")
        assert item.bought is None
        assert item._seen().asin == expected
        assert "buy now" in item.page.clickables()
    turned = visit(shop, "search[table]", "click[next >]")
    assert "Page 2" in turned.page.read("text"), "here it is a button of this page"


def test_only_what_a_click_can_say_is_offered():
    shop = shop_of(entry("B01", customization_options=BUTTONS))
    item = visit(shop, "search[table]", "click[b01]")
    for action in item.possible():
        assert parsed(action), action
        assert visit(shop, "search[table]", "click[b01]").act(action), action
    assert {"click[]", "click[x [y]]", "click[[x]]", "click[a\nb]"}.isdisjoint(item.possible())


def test_products_at_random_are_drawn_again_on_every_turn():
    shop = shop_of(*(entry(f"B{number:03}") for number in range(200)))
    results = visit(shop, "search[<r>]")
    first = results._hits
    results.act("click[next >]")
    second = results._hits
    results.act("click[< prev]")
    assert len({tuple(hits) for hits in (first, second, results._hits)}) == 3


def test_in_the_short_form_chosen_is_what_was_chosen():
    """The original marks by what stands in quotes in the address: not é, and what was searched for."""
    options = {"a": values("red", "é", '6"'), "b": values("red", "small")}
    shop = shop_of(entry("B01", customization_options=options))
    for name in ("é", '6"'):
        told = visit(shop, "search[table]", "click[b01]", f"click[{name}]").page
        assert f"{name} (chosen)" in told.read("short")
        assert "clicked" not in told.read("text_rich")
    told = visit(shop, 'search[table "small"]', "click[b01]", "click[red]").page
    assert told.read("short").count("(chosen)") == 1
    assert told.read("short").index("red (chosen)") > told.read("short").index("b [SEP]")
    assert told.read("text_rich").count("You have clicked red.") == 2
    assert "You have clicked small." in told.read("text_rich")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ไทย ลาว", ["ไทย", "ลาว"]),
        ("men＇s shoes", ["men", "shoe"]),
        ("x" * 600, ["x" * 255, "x" * 255, "x" * 90]),
    ],
)
def test_words_of_other_scripts_and_long_ones(text, found):
    assert terms(text) == found


def test_a_made_up_catalogue_can_be_bought_from(tmp_path):
    (tmp_path / "shop").mkdir()
    write_catalogue(tmp_path / "shop", 60, seed=3)
    again = tmp_path / "again"
    again.mkdir()
    write_catalogue(again, 60, seed=3)
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / "shop" / file.name).read_bytes()
    suite = WebShopSuite(catalogue=str(tmp_path / "shop"))
    goods = suite.goods("synthetic")
    assert len(goods.products) == 60
    environment = suite.open()
    for number in range(0, len(goods.goals), 7):
        example = environment.worked_example(Task(environment="webshop", name="synthetic", variation=number))
        assert example.turns[-1][1] == "click[buy now]"
        assert environment._visit.bought.total == 1.0


def test_splits_and_what_is_not_there(folder):
    suite = WebShopSuite(catalogue=str(folder))
    assert suite.variations("synthetic", "test") == (0, 1, 2, 3, 4)
    assert suite.variations("synthetic", "train") == suite.variations("synthetic", "dev") == ()
    assert suite.variations("human", "test") == (0,)
    assert suite.about()["products"] == 4
    for task in (
        Task(environment="webshop", name="synthetic", variation=5),
        Task(environment="webshop", name="x", variation=0),
    ):
        with pytest.raises(UsageError, match="there is no"):
            suite.open().reset(task, 0)


def test_the_environment(folder):
    environment = WebShopSuite(catalogue=str(folder), page="short").open()
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("search[x]")
    observation, info = environment.reset(Task(environment="webshop", name="synthetic", variation=0), 0)
    assert (observation, info["actions"]) == ("WebShop [SEP] Search", ())
    assert "offer" not in info
    assert info["task"].startswith("Find me")
    _, reward, terminated, truncated, info = environment.step("search[oak coffee table]")
    assert (reward, terminated, truncated, info["valid"]) == (0.0, False, False, True)
    assert info["actions"][-1] == "click[b04]"
    assert "offer" not in info
    assert environment.step("click[nothing]")[4]["valid"] is False
    environment.step("click[b04]")
    observation, reward, terminated, _, info = environment.step("click[buy now]")
    assert terminated
    assert (reward, info["success"]) == (info["reward"]["total"], info["reward"]["total"] == 1)
    assert str(reward) not in info["state"]
    assert "offer" not in info
    with pytest.raises(RuntimeError, match="call reset"):
        environment.step("search[x]")
    environment.close()
    environment.close()


@pytest.mark.parametrize("page", ["text", "text_rich"])
def test_the_search_bar_is_offered_in_the_originals_forms(folder, page):
    environment = WebShopSuite(catalogue=str(folder), page=page).open()
    _, info = environment.reset(Task(environment="webshop", name="synthetic", variation=0), 0)
    assert (info["actions"], info["offer"]) == ((), "You can:\nsearch[words]")
    assert "offer" not in environment.step("search[oak coffee table]")[4]
    environment.step("click[b04]")
    assert "offer" not in environment.step("click[buy now]")[4]


WORDED = st.text(max_size=30) | st.sampled_from(
    ["oak coffee table", "<r>", "<a> x", "<q>", "b01", "next >", "< prev", "["]
)


@given(st.lists(st.builds("{}[{}]".format, st.sampled_from(["search", "click", "x"]), WORDED) | st.text(), max_size=12))
@settings(deadline=None, max_examples=150)
def test_random_actions_never_raise_and_earn_nothing_before_buying(shop, actions):
    made = Visit(shop, shop.goals[0], random.Random(0))
    for action in actions:
        clickables = made.page.clickables()
        possible = made.act(action)
        made.page.read("text")
        made.page.read("text_rich")
        if made.bought is not None:
            assert possible
            assert "buy now" in clickables
            break


# The real 1,000-product set

real = pytest.mark.skipif(not REAL, reason="EMPO2_WEBSHOP_DATA names no folder")


@pytest.fixture(scope="module")
def real_products():
    return in_memory(list(products.read_products(Path(str(REAL)))))


@real
@pytest.mark.parametrize("seed", [0, 1, 2022])
def test_goals_of_the_real_set(real_products, seed):
    goods = Catalogue(real_products, seed=seed)
    assert len(goods.products) == 1000
    assert (len(goods.goals), len({goal.place for goal in goods.goals})) == (6910, 415)
    again = Catalogue(real_products, seed=seed)
    assert [goal.text for goal in again.goals] == [goal.text for goal in goods.goals]
    assert [(g.place, g.options) for g in Catalogue(real_products, seed=seed + 1).goals] == [
        (g.place, g.options) for g in goods.goals
    ]
    assert len(Catalogue(real_products, seed=seed, human=True).goals) == 13


GOALS = """
import hashlib, sys
from pathlib import Path
from empo2.envs.webshop import products
from empo2.envs.webshop.catalogue import Catalogue, in_memory
goods = Catalogue(in_memory(list(products.read_products(Path(sys.argv[1])))), seed=3)
print(hashlib.sha256(repr(list(goods.goals)).encode()).hexdigest())
"""


@real
def test_goals_are_the_same_in_every_process(real_products):
    told = [
        subprocess.run(
            [sys.executable, "-c", GOALS, str(REAL)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    here = hashlib.sha256(repr(list(Catalogue(real_products, seed=3).goals)).encode()).hexdigest()
    assert told == [f"{here}\n"] * 2


@real
def test_what_the_right_purchases_are_worth(real_products):
    goods = Catalogue(real_products, seed=0)
    below = [g for g in goods.goals if goods.reward(g, g.place, g.options.values()).total < 1]
    assert (len(below), len({goal.place for goal in below})) == (458, 17)
    fixed = Catalogue(real_products, seed=0, fixed=True)
    assert all(fixed.reward(goal, goal.place, goal.options.values()).total == 1 for goal in fixed.goals)
    people = Catalogue(real_products, seed=0, human=True)
    assert all(people.reward(goal, goal.place, goal.options).total == 1 for goal in people.goals)


@real
def test_simple_policies_on_the_real_set(real_products):
    """On goals 0 to 99: who buys what was asked for, and who buys the first hit for its attributes, with no option."""
    goods = Catalogue(real_products, seed=0)

    def bought(place: int, goal: goals.Goal, options: list[str]) -> float:
        return goods.reward(goal, place, options).total

    asked = [goods.goals[number] for number in range(100)]
    oracle = [bought(goal.place, goal, list(goal.options.values())) for goal in asked]
    first = [bought(goods.hits(" ".join(goal.attributes), random.Random(0))[0], goal, []) for goal in asked]
    assert (round(sum(oracle) / 100, 3), oracle.count(1)) == (0.995, 97)
    assert (round(sum(first) / 100, 2), first.count(1)) == (0.35, 4)
