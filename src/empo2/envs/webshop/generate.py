"""A made-up catalogue in the official schema, so that WebShop can be learned with nothing downloaded.

Products come in families: the one asked for, and others that differ from it in exactly one attribute, one option value,
or the price. The product's noun stands in each title, every product has an entry among the instructions.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from empo2.cache import made_once


class Kind(NamedTuple):
    """What is sold."""

    category: str
    path: str  #: of categories
    query: str  #: its name in the plural
    noun: str
    attributes: str  #: which of `ATTRIBUTES`
    options: str  #: names, which of `VALUES`


KINDS = [
    Kind(
        "garden",
        "Home & Kitchen › Furniture › Living Room Furniture › Tables",
        "coffee tables",
        "coffee table",
        "furniture",
        "color size",
    ),
    Kind("garden", "Home & Kitchen › Bedding › Pillows", "throw pillows", "throw pillow", "fabric", "color size"),
    Kind("garden", "Home & Kitchen › Bath › Towels", "bath towels", "bath towel", "fabric", "color"),
    Kind("garden", "Home & Kitchen › Lighting › Lamps", "table lamps", "table lamp", "furniture", "color style"),
    Kind(
        "garden", "Home & Kitchen › Storage › Baskets", "storage baskets", "storage basket", "furniture", "color size"
    ),
    Kind("fashion", "Clothing › Men › Shirts", "men's shirts", "men shirt", "clothing", "color size"),
    Kind("fashion", "Clothing › Women › Dresses", "women's dresses", "women dress", "clothing", "color size"),
    Kind("fashion", "Clothing › Women › Shoes › Boots", "ankle boots", "ankle boot", "clothing", "color size"),
    Kind("fashion", "Clothing › Men › Jackets", "rain jackets", "rain jacket", "clothing", "color size"),
    Kind("fashion", "Clothing › Accessories › Scarves", "winter scarves", "winter scarf", "fabric", "color"),
    Kind("beauty", "Beauty › Skin Care › Face › Creams", "face creams", "face cream", "beauty", "scent size"),
    Kind("beauty", "Beauty › Hair Care › Shampoo", "shampoos", "shampoo", "beauty", "scent size"),
    Kind("beauty", "Beauty › Oral Care › Toothbrushes", "toothbrushes", "toothbrush", "beauty", "color"),
    Kind("beauty", "Beauty › Makeup › Lips", "lip balms", "lip balm", "beauty", "flavor"),
    Kind("beauty", "Beauty › Tools › Brushes", "makeup brushes", "makeup brush", "beauty", "color style"),
    Kind("grocery", "Grocery › Snacks › Bars", "granola bars", "granola bar", "food", "flavor size"),
    Kind("grocery", "Grocery › Beverages › Tea", "herbal teas", "herbal tea", "food", "flavor size"),
    Kind("grocery", "Grocery › Snacks › Chips", "potato chips", "potato chip", "food", "flavor size"),
    Kind("grocery", "Grocery › Pantry › Sauces", "pasta sauces", "pasta sauce", "food", "flavor"),
    Kind("grocery", "Grocery › Snacks › Nuts", "roasted almonds", "roasted almond", "food", "flavor size"),
    Kind(
        "electronics",
        "Electronics › Headphones › Wireless",
        "wireless headphones",
        "wireless headphone",
        "electronics",
        "color",
    ),
    Kind(
        "electronics",
        "Electronics › Computers › Keyboards",
        "computer keyboards",
        "computer keyboard",
        "electronics",
        "color style",
    ),
    Kind(
        "electronics", "Electronics › Cables › Chargers", "phone chargers", "phone charger", "electronics", "color size"
    ),
    Kind(
        "electronics", "Electronics › Audio › Speakers", "portable speakers", "portable speaker", "electronics", "color"
    ),
    Kind(
        "electronics", "Electronics › Cameras › Tripods", "camera tripods", "camera tripod", "electronics", "color size"
    ),
]
ATTRIBUTES = {
    "furniture": "easy assemble,solid wood,space saving,water resistant,heavy duty,easy clean,hand painted,steel frame",
    "fabric": "machine washable,double sided,super soft,quick drying,fade resistant,hand woven,long lasting",
    "clothing": "slim fit,long sleeve,high waist,water proof,light weight,hand wash,non slip,tummy control,rubber sole",
    "beauty": "cruelty free,paraben free,tea tree,dry skin,travel size,fragrance free,sensitive skin",
    "food": "gluten free,low sugar,non gmo,dairy free,individually wrapped,high protein,plant based,resealable bag",
    "electronics": "fast charging,noise cancelling,easy carry,high speed,long range,aluminum alloy,plug play",
}
VALUES = {
    "color": "black,white,navy,red,green,grey,pink,beige,brown,purple,yellow,teal",
    "size": "small,medium,large,x-large,xx-large,3 pack,6 pack,12 pack",
    "style": "modern,vintage,classic,compact,deluxe",
    "scent": "lavender,vanilla,citrus,rose,coconut,mint",
    "flavor": "original,cherry,chocolate,honey,lemon,strawberry,sea salt,cinnamon",
}
SYLLABLES = (
    "ba be bo da de do fa fi ka ke ko la le lo ma mi mo na ne no ra ri ro sa se so ta ti to va ve vo za zu".split()
)
NUM_PRODUCTS = 2000
FORMAT = 1  #: raise it when equal seeds make another catalogue


def catalogue_folder(num_products: int, seed: int) -> Path:
    """Where the made-up catalogue is, written if it is not there yet."""
    name = f"webshop/made-up-{FORMAT}-{num_products}-{seed}"
    return made_once(name, lambda folder: write_catalogue(folder, num_products, seed))


def write_catalogue(folder: Path, num_products: int, seed: int) -> None:
    """Write the three files of a catalogue of ``num_products`` into a folder."""
    rng = random.Random(f"catalogue/{seed}")
    products: list[dict[str, Any]] = []
    instructions: dict[str, Any] = {}
    people: dict[str, Any] = {}
    while len(products) < num_products:
        for product, told, asked in _family(rng, len(products))[: num_products - len(products)]:
            products.append(product)
            instructions[product["asin"]] = told
            if asked:
                people[product["asin"]] = asked
    rng.shuffle(products)
    written = ("items_shuffle", products), ("items_ins_v2", instructions), ("items_human_ins", people)
    for name, content in written:
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _family(rng: random.Random, first: int) -> list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]:
    """Products with what is said of each; only the first is asked for."""
    kind = rng.choice(KINDS)
    pool = ATTRIBUTES[kind.attributes].split(",")
    attributes = rng.sample(pool, rng.randint(2, 3))
    options = {name: rng.sample(VALUES[name].split(","), rng.randint(3, 4)) for name in kind.options.split()}
    price = rng.randint(500, 9000) / 100
    other = rng.choice([attribute for attribute in pool if attribute not in attributes])
    name = rng.choice(list(options))
    new = rng.choice([value for value in VALUES[name].split(",") if value not in options[name]])
    replaced = [new, *options[name][1:]]
    members = [
        (attributes, options, price),
        ([other, *attributes[1:]], options, price),
        (attributes, {**options, name: replaced}, price),
        (attributes, options, round(price * rng.uniform(2, 4) + 40, 2)),
    ]
    made = []
    for number, (having, offering, costing) in enumerate(members):
        product = _product(rng, first + number, kind, having, offering, costing)
        told: dict[str, Any] = {"attributes": having}
        asked: list[dict[str, Any]] = []
        if number == 0:
            wanted = ", ".join(attributes[:-1])
            told |= {
                "instruction": f"Find me {wanted} {kind.query} with {attributes[-1]}",
                "instruction_attributes": attributes,
            }
            values = [rng.choice(values) for values in options.values()]
            text = f"i need a {values[0]} {kind.noun} that is {attributes[0]}."
            asked = [{"instruction": text, "instruction_attributes": attributes[:1], "instruction_options": values[:1]}]
        made.append((product, told, asked))
    return made


def _product(
    rng: random.Random,
    number: int,
    kind: Kind,
    attributes: list[str],
    options: dict[str, list[str]],
    price: float,
) -> dict[str, Any]:
    category, path, query, noun, *_ = kind
    brand = "".join(rng.sample(SYLLABLES, 3)).title()
    told = [f"{attribute.capitalize()}: made to be {attribute}." for attribute in attributes]
    top = f"{price + rng.randint(100, 900) / 100:.2f}"
    return {
        "asin": f"B{number:09d}",
        "name": f"{brand} {noun.title()}, {', '.join(attribute.title() for attribute in attributes)}",
        "full_description": f"This {noun} by {brand} comes in {len(options)} kinds of options. {' '.join(told)}",
        "small_description": told,
        "pricing": f"${price:.2f}${top}" if rng.random() < 0.1 else f"${price:.2f}",
        "query": query,
        "category": category,
        "product_category": path,
        "customization_options": {name: [{"value": value} for value in values] for name, values in options.items()},
    }
