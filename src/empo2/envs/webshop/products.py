"""WebShop's products, read from the official files as the original reads them.

Rules: Yao et al. 2022 (arXiv 2207.01206) and its public code; docs/environments.md says what differs here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from empo2.errors import UsageError

NO_PRICE = 100.0  #: of a product without one
DUMMY_ATTRIBUTE = "DUMMY_ATTR"  #: of a product that the instruction file says nothing about
LONGEST_ASIN = 10  #: an entry with a longer one is passed over
READ_AT_ONCE = 1 << 24  #: characters of the products file


@dataclass(frozen=True, slots=True)
class HumanInstruction:
    """One that a person wrote for a product."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """One entry of the catalogue. Texts are as in the file; option names and values are in lower case."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    attributes: tuple[str, ...]  #: what the reward compares with
    query: str
    category: str
    product_category: str
    options: Mapping[str, tuple[str, ...]]
    prices: tuple[float, ...]  #: one, or the ends of a range from which it is drawn
    price_tag: str
    instruction: str | None  #: synthetic; None if there is no goal for it
    instruction_attributes: tuple[str, ...]
    human: tuple[HumanInstruction, ...]


class Entry:
    """One JSON object of a file, whose fields are asked for by type. Errors name file, product and field."""

    def __init__(self, path: Path, name: str, fields: Any) -> None:
        self.path, self.name = path, name
        if not isinstance(fields, dict):
            raise UsageError(f"{path}: {name} must be an object, not {_kind(fields)}")
        self._fields = fields

    def wrong(self, field: str, problem: str) -> UsageError:
        return UsageError(f"{self.path}: {self.name}: {field} {problem}")

    def has(self, field: str) -> bool:
        return self._fields.get(field) is not None

    def get(self, field: str) -> Any:
        if field not in self._fields:
            raise self.wrong(field, "is missing")
        return self._fields[field]

    def text(self, field: str) -> str:
        value = self.get(field)
        if not isinstance(value, str):
            raise self.wrong(field, f"must be a text, not {_kind(value)}")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        value = self.get(field)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(field, f"must be a list of texts, not {_kind(value)}")
        return tuple(value)


def read_products(folder: Path, *, limit: int | None = None) -> Iterator[Product]:
    """The products of a folder with the official files, in their order; ``limit``: of the first so many entries.

    Raises UsageError for files that are missing or malformed.
    """
    instructions_path, human_path = _file(folder, "items_ins_v2"), _file(folder, "items_human_ins", required=False)
    instructions = _mapping(instructions_path)
    human = _mapping(human_path) if human_path else {}
    seen: set[str] = set()
    path = _file(folder, "items_shuffle")
    for number, fields in enumerate(_listed(path)):
        if limit is not None and number >= limit:
            return
        entry = Entry(path, f"product {number}", fields)
        asin = entry.text("asin")
        if asin == "nan" or len(asin) > LONGEST_ASIN or asin in seen:
            continue
        seen.add(asin)
        entry.name += f" ({asin})"
        about = Entry(instructions_path, asin, instructions[asin]) if asin in instructions else None
        yield _product(entry, about, _human(human_path, asin, human.get(asin, ())))


def _product(entry: Entry, about: Entry | None, human: tuple[HumanInstruction, ...]) -> Product:
    prices, tag = _prices(entry)
    synthetic = about is not None and about.has("instruction")
    return Product(
        asin=entry.text("asin"),
        title=entry.text("name"),
        description=entry.text("full_description"),
        bullets=_bullets(entry),
        attributes=about.texts("attributes") if about and about.has("attributes") else (DUMMY_ATTRIBUTE,),
        query=entry.text("query").lower().strip(),
        category=entry.text("category"),
        product_category=entry.text("product_category"),
        options=_options(entry),
        prices=prices,
        price_tag=tag,
        instruction=about.text("instruction") if about and synthetic else None,
        instruction_attributes=about.texts("instruction_attributes") if about and synthetic else (),
        human=human,
    )


def _bullets(entry: Entry) -> tuple[str, ...]:
    if isinstance(entry.get("small_description"), list):
        return entry.texts("small_description")
    return (entry.text("small_description"),)


def _prices(entry: Entry) -> tuple[tuple[float, ...], str]:
    """What the price is or lies between, and how it is shown: `$24.99`, `$5.0`, `$3.0 to $4.5`."""
    if not entry.has("pricing") or not (pricing := entry.text("pricing")):
        return (NO_PRICE,), f"${NO_PRICE}"
    try:
        prices = [float("".join(c for c in part if c == "." or c.isdecimal())) for part in pricing.split("$")[1:]][:2]
    except ValueError:
        prices = []
    if not prices:
        raise entry.wrong("pricing", f"holds no price after a $: {pricing!r}")
    return tuple(prices), " to ".join(f"${price}" for price in prices)


def _options(entry: Entry) -> dict[str, tuple[str, ...]]:
    """Of repeated names the later values win, at the first one's place."""
    given = entry.get("customization_options")
    if given is None or given == "":
        return {}
    if not isinstance(given, dict):
        raise entry.wrong("customization_options", f"must be an object or an empty text, not {_kind(given)}")
    options = {}
    for name, values in given.items():
        field = f"customization_options[{name!r}]"
        if values is None:
            continue
        if not isinstance(values, list):
            raise entry.wrong(field, f"must be a list, not {_kind(values)}")
        texts = [value.get("value") if isinstance(value, dict) else None for value in values]
        named = [text for text in texts if isinstance(text, str)]
        if len(named) < len(values):
            raise entry.wrong(field, "must hold objects with a text `value`")
        options[name.lower()] = tuple(text.strip().replace("/", " | ").lower() for text in named)
    return options


def _human(path: Path | None, asin: str, given: Any) -> tuple[HumanInstruction, ...]:
    if path is None or not given:
        return ()
    if not isinstance(given, list):
        raise UsageError(f"{path}: {asin} must be a list of instructions, not {_kind(given)}")
    entries = [Entry(path, f"{asin}, instruction {number}", fields) for number, fields in enumerate(given)]
    return tuple(
        HumanInstruction(
            text=entry.text("instruction"),
            attributes=entry.texts("instruction_attributes"),
            options=entry.texts("instruction_options"),
        )
        for entry in entries
    )


def official_files(folder: Path) -> list[Path]:
    """Products, instructions and, if it is there, people's instructions."""
    files = (
        _file(folder, "items_shuffle"),
        _file(folder, "items_ins_v2"),
        _file(folder, "items_human_ins", required=False),
    )
    return [file for file in files if file]


def _file(folder: Path, stem: str, *, required: bool = True) -> Any:
    """The folder's file of that name, `items_shuffle.json` or with a number of products, `items_shuffle_1000.json`."""
    found = sorted(folder.glob(f"{stem}*.json"))
    if len(found) > 1:
        raise UsageError(f"{folder} has several files {stem}*.json: {', '.join(path.name for path in found)}; keep one")
    if not found and required:
        raise UsageError(f"{folder} has no file {stem}*.json; WebShop's catalogue is items_shuffle and items_ins_v2")
    return found[0] if found else None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} must hold an object by asin, not {_kind(found)}")
    return found


def _listed(path: Path) -> Iterator[Any]:
    """The members of a JSON list, one at a time: the whole catalogue is 5 GB."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as file:
        text, number = _more(file, path).lstrip("\ufeff \t\r\n"), 0
        if not text.startswith("["):
            raise UsageError(f"{path} must hold a list of products")
        place, after_comma = 1, True
        while True:
            while place < len(text) and text[place] in " \t\r\n":
                place += 1
            here = text[place : place + 1]
            if here == "]" and (not number or not after_comma):
                if (text[place + 1 :] + _more(file, path)).strip():
                    raise UsageError(f"{path} goes on after the list of products")
                return
            if here == "," and not after_comma:
                place, after_comma = place + 1, True
                continue
            if here and not after_comma:
                raise UsageError(f"{path}: product {number} is not valid JSON (there is no comma before it)")
            try:
                member, place = decoder.raw_decode(text, place)
            except ValueError as error:
                more = _more(file, path)
                if not more:
                    raise UsageError(
                        f"{path}: product {number} is not valid JSON ({error}); is the file cut off?"
                    ) from error
                text, place = text[place:] + more, 0
                continue
            yield member
            number, after_comma = number + 1, False


def _more(file: TextIO, path: Path) -> str:
    try:
        return file.read(READ_AT_ONCE)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not in UTF-8 ({error})") from error


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")
