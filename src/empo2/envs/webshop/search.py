"""Search as the original has it: Lucene's BM25 with its English analyzer, to the order of its float32 operations.

Lucene keeps a document's length in one byte (`rounded_length`), which is why other libraries rank a little otherwise.
"""

import re
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from empo2.envs.webshop.products import Product

K1, B = 0.9, 0.4
MOST_HITS = 50
LONGEST_WORD = 255
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)


#: Symbols that Unicode counted among the emoji when Lucene's tokenizer was made.
_ONCE_EMOJI = (
    "2388 2605 2607-260D 260F-2610 2612 2616-2617 2619-261C 261E-261F 2621 2624-2625 2627-2629 262B-262D "
    "2630-2637 263B-263F 2641 2643-2647 2654-265E 2661-2662 2664 2667 2669-267A 267C-267D 2680-2685 2690-2691 "
    "2698 269A 269D-269F 26A2-26A6 26A8-26A9 26AC-26AF 26B2-26BC 26BF-26C3 26C6-26C7 26C9-26CD 26D0 26D2 "
    "26D5-26E8 26EB-26EF 26F6 26FB-26FC 26FE-2701 2703-2704 270E 2710-2711 2765-2767 1F000-1F003 1F005-1F02B "
    "1F030-1F093 1F0A0-1F0AE 1F0B1-1F0BF 1F0C1-1F0CE 1F0D1-1F0F5 1F10D-1F10F 1F12F 1F16C-1F16F 1F1AD-1F1AE "
    "1F260-1F265 1F322-1F323 1F394-1F395 1F398 1F39C-1F39D 1F3F1-1F3F2 1F3F6 1F3FB-1F3FF 1F4FE 1F546-1F548 1F54F "
    "1F568-1F56E 1F571-1F572 1F57B-1F586 1F588-1F589 1F58E-1F58F 1F591-1F594 1F597-1F5A3 1F5A6-1F5A7 1F5A9-1F5B0 "
    "1F5B3-1F5BB 1F5BD-1F5C1 1F5C5-1F5D0 1F5D4-1F5DB 1F5DF-1F5E0 1F5E2 1F5E4-1F5E7 1F5E9-1F5EE 1F5F0-1F5F2 "
    "1F5F4-1F5F9 1F6C6-1F6CA 1F6D3-1F6D4 1F6E6-1F6E8 1F6EA 1F6F1-1F6F2 1F774-1F77F 1F7D5-1F7DB 1F7F1-1F7FF "
    "1F8B0-1F8BB 1F8C0-1F8C1 1F8D0-1F8D8 1FA00-1FA57 1FA60-1FA6D"
)


def _word_pattern() -> str:
    """Unicode's word boundaries (UAX #29) as Lucene's StandardTokenizer has them, of which words and emoji are kept."""
    more = r"[\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}]*"
    letter, digit = rf"[\p{{WB=ALetter}}\p{{WB=Hebrew_Letter}}]{more}", rf"\p{{WB=Numeric}}{more}"
    katakana, joiner = rf"\p{{WB=Katakana}}{more}", rf"\p{{WB=ExtendNumLet}}{more}"
    in_both = r".'\u2018\u2019\u2024\uFE52\uFF07\uFF0E"
    in_words = rf"[:\u00B7\u0387\u05F4\u2027\uFE13\uFE55\uFF1A{in_both}]{more}"
    in_numbers = rf"[,;\u037E\u0589\u060C\u060D\u066C\u07F8\u2044\uFE10\uFE14\uFE50\uFE54\uFF0C\uFF1B{in_both}]{more}"
    words = rf"{letter}(?:(?:(?:{joiner})*|{in_words}){letter})*"
    numbers = rf"{digit}(?:(?:(?:{joiner})*|{in_numbers}){digit})*"
    run = rf"(?:{katakana}(?:(?:{joiner})*{katakana})*|(?:{words}|{numbers})+)"
    once = "".join("-".join(f"\\U{int(end, 16):08X}" for end in part.split("-")) for part in _ONCE_EMOJI.split())
    picture = rf"[\p{{Extended_Pictographic}}{once}]{more}"
    emoji = rf"{picture}(?:(?<=\u200D){picture})*"
    flag = r"\p{Regional_Indicator}{2}"
    alone = rf"[\p{{Script=Han}}\p{{Script=Hiragana}}]{more}"
    together = rf"(?:\p{{Line_Break=Complex_Context}}{more})+"  # Thai, Lao and others without blanks between words
    return rf"(?:{joiner})*{run}(?:(?:{joiner})+{run})*(?:{joiner})*|{flag}|{emoji}|{alone}|{together}"


_WORD = regex.compile(_word_pattern())


def document(product: Product) -> str:
    """What of a product is searched."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    return " ".join([product.title, product.description, *(product.bullets[:1] or ("",)), options]).lower()


def terms(text: str) -> list[str]:
    """The words of a text as they are compared: in lower case, without possessive, stop words and endings."""
    pieces = (piece for word in _WORD.findall(text.lower()) for piece in _pieces(word))
    words = (re.sub(r"['’\uFF07]s$", "", piece) for piece in pieces)
    return [_stem(word) for word in words if word not in STOP_WORDS]


def _pieces(word: str) -> list[str]:
    """Of a longer word pieces of `LONGEST_WORD`."""
    return [word[start : start + LONGEST_WORD] for start in range(0, len(word), LONGEST_WORD)]


#: A vowel and a consonant after it: what has them is long enough to lose an ending.
_MEASURED = re.compile("[aeiou][^aeiou]|[^aeiou]y[^aeiou]")


@lru_cache(maxsize=200_000)
def _stem(word: str) -> str:
    """Porter's stem with the two departures of his own programs, which Lucene has and Snowball's `porter` has not."""
    if word.endswith(("bly", "blies")) and _MEASURED.search(word[: word.rindex("bl")]):
        word = word[: word.rindex("bl")] + "ble"  # assembly, assemble
    elif word.endswith(("logy", "logies")) and _MEASURED.search(word[: word.rindex("log")]):
        word = word[: word.rindex("log") + 3]  # technology, technolog
    return str(_stemmer().stemWord(word)) if len(word) > 2 else word


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("porter", 0)


def rounded_length(length: int) -> int:
    """What Lucene's byte keeps of a length: all of it up to 40, then four significant bits of what is over 24."""
    over = length - 24
    bits = over.bit_length()
    return 24 + (over >> bits - 4 << bits - 4) if length >= 40 else length


@dataclass
class Postings:
    """Collects products one by one, in their order."""

    _found: "dict[str, tuple[array[int], array[int]]]" = field(default_factory=dict)
    _lengths: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, product: Product) -> None:
        words = terms(document(product))
        for term, count in Counter(words).items():
            places, counts = self._found.setdefault(term, (array("i"), array("i")))
            places.append(len(self._lengths))
            counts.append(count)
        self._lengths.append(len(words))

    def index(self) -> "SearchIndex":
        names = sorted(self._found)
        having = np.array([len(self._found[name][0]) for name in names], np.int64)
        places, counts = (
            np.concatenate(
                [np.zeros(0, np.int32), *(np.frombuffer(self._found[name][part], np.int32) for name in names)]
            )
            for part in (0, 1)
        )
        return SearchIndex(
            vocabulary={name: number for number, name in enumerate(names)},
            starts=np.cumsum(np.concatenate([np.zeros(1, np.int64), having])),
            places=places,
            scores=_scores(places, counts, having, np.array(self._lengths)),
            num_products=len(self._lengths),
        )


@dataclass(frozen=True)
class SearchIndex:
    """For each term the products that have it and what it adds to their score."""

    vocabulary: Mapping[str, int]
    starts: NDArray[np.int64]  #: where a term's products begin, [V + 1]
    places: NDArray[np.int32]  #: of the products, in their order
    scores: NDArray[np.float32]
    num_products: int

    def search(self, text: str) -> list[int]:
        """The places of at most 50 products, best first, ties in the catalogue's order."""
        total = np.zeros(self.num_products)
        for term, count in Counter(terms(text)).items():
            number = self.vocabulary.get(term)
            if number is not None:
                found = slice(self.starts[number], self.starts[number + 1])
                total[self.places[found]] += np.float32(count) * self.scores[found]
        hits = np.flatnonzero(total)
        rounded = total[hits].astype(np.float32)
        if len(hits) > MOST_HITS:
            least = np.partition(rounded, -MOST_HITS)[-MOST_HITS]
            hits, rounded = hits[rounded >= least], rounded[rounded >= least]
        return [int(place) for place in hits[np.argsort(-rounded, kind="stable")[:MOST_HITS]]]


def _scores(
    places: NDArray[np.int32], counts: NDArray[np.int32], having: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """What each product's occurrences of each term add; ``having``: products of each term."""
    one = np.float32(1)
    rarity = np.log(1 + (len(lengths) - having + 0.5) / (having + 0.5)).astype(np.float32)
    weight = np.repeat(rarity, having)
    average = np.float32(lengths.sum() / max(len(lengths), 1))
    kept = np.array([rounded_length(int(length)) for length in lengths], np.float32)
    inverse = one / (np.float32(K1) * ((one - np.float32(B)) + np.float32(B) * kept / average))
    scores = weight - weight / (one + counts.astype(np.float32) * inverse[places])
    return scores.astype(np.float32)
