"""Scores of one answer against its references, each in [0, 1].

ROUGE-L is Lin 2004 (aclanthology.org/W04-1013), over Unicode words with each Han character a word of its own: splitting at
spaces, as most packages do, gives 0 to two equal Chinese strings.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

HAN = "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+")
FRACTIONS = "\u00bc-\u00be\u2150-\u215e\u2189"
RAISED = re.compile(rf"(?<=\d)(?=[\u00b2\u00b3\u00b9\u2070-\u2089{FRACTIONS}])")
JOINT = "\u2064"  # invisible plus, between a number and what NFKC would else make more digits of it

# What `contains` takes for the edge of a word. Scripts without spaces between words, or with particles and articles written onto
# them, have no edges: Han and kana, Hangul, Hebrew and Arabic, those from Thai to Khmer.
LETTER = rf"[^\W_{HAN}\u0590-\u08ff\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\uac00-\ud7a3]"

SIGN = r"((?:(?<![\w)])[-+])?)"  # behind a number, a word or a bracket it is one of addition or subtraction
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
DECIMAL = rf"(?<!\d\.){WHOLE}\.\d+(?!\.?\d)"  # neither part of a date nor of a version
UNLED = re.compile(rf"(?<!{LETTER})(?<![\d.])\.\d+(?!\.?\d)")  # ".5"; the point of "Fig.4" is one of an abbreviation
NUMBER = re.compile(rf"{SIGN}(?:(?:{DECIMAL}|{WHOLE})(?:[eE][-+]?\d+)?|{UNLED.pattern})")
TERM = re.compile(rf"{NUMBER.pattern}(?:[\u2044{JOINT}][-+]?\d+)*")  # with its fraction or power, in normalised text
MIXED = re.compile(rf"(?:(?<!\d)({WHOLE}) ?)?([{FRACTIONS}])")

MINUS = {0x2212: "-"}
CIRCLED = {0x245F + n: f" {n} " for n in range(1, 21)}
PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | MINUS | CIRCLED  # full-width ASCII too


def normal(text: str) -> str:
    """Compared text: compatibility form, the minus sign as in ASCII, case folded, white space single, no full stop at the end."""
    text = unicodedata.normalize("NFKC", RAISED.sub(JOINT, text)).translate(MINUS)
    return " ".join(text.casefold().split()).rstrip(".。 ")


def exact(output: str, answer: str) -> float:
    """1 where the two are equal once normalised."""
    return float(normal(output) == normal(answer))


def contains(output: str, answer: str) -> float:
    """1 where the normalised answer stands in the output, as whole words and numbers: '4' is not in '14', '1.4', '4,000' or '-4'.

    '.5' is '0.5'. An answer in a script whose words have no edges may stand anywhere.
    """
    wanted, text = (UNLED.sub(r"0\g<0>", normal(side)) for side in (answer, output))
    if not wanted:
        return 0.0
    head = rf"(?<!{LETTER})" if re.match(LETTER, wanted) else ""
    tail = rf"(?!{LETTER})" if re.search(rf"{LETTER}$", wanted) else ""
    places = {match.start() for match in re.finditer(rf"{head}(?={re.escape(wanted)}{tail})", text)}
    terms = list(TERM.finditer(text))
    if TERM.match(wanted):
        places &= {term.start() for term in terms} | {term.end(1) for term in terms if term[1] == "+"}
    if re.search(r"\d$", wanted):
        places &= {term.end() - len(wanted) for term in terms}
    return float(bool(places))


def regex(output: str, pattern: str) -> float:
    """1 where the pattern is found in the output, as it is."""
    return float(re.search(pattern, output) is not None)


def plain(text: str) -> str:
    """A text with its numbers in ASCII: full-width and circled digits, the minus sign, fractions as decimals."""
    return MIXED.sub(_decimal, text.translate(PLAIN))


def numbers(text: str) -> list[float]:
    """The numbers written in a text ('1,250.5', '-3', '3½', '③', full-width digits too), in order.

    A minus after a digit is a sign of subtraction; raised and lowered digits ('10 m²', 'CO₂') are of no number; those of a date or
    version ('1.5.2024') are several.
    """
    return [float(match[0].replace(",", "")) for match in NUMBER.finditer(plain(text))]


def last_number(text: str) -> float | None:
    """The last number written in a text."""
    return next(reversed(numbers(text)), None)


def _decimal(mixed: re.Match[str]) -> str:
    """A whole number with a fraction behind it ('3½'), or a fraction alone, as a decimal."""
    return str(float((mixed[1] or "0").replace(",", "")) + unicodedata.numeric(mixed[2]))


def number(output: str, answer: str) -> float:
    """1 where the last number of the output equals the answer's, within one part in a million."""
    found, wanted = last_number(output), last_number(answer)
    return float(found is not None and wanted is not None and math.isclose(found, wanted, rel_tol=1e-6, abs_tol=1e-9))


def rouge(output: str, answer: str) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words."""
    a, b = (WORD.findall(unicodedata.normalize("NFKC", t).casefold()) for t in (output, answer))
    return 2 * longest_common(a, b) / (len(a) + len(b)) if a and b else 0.0


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a whole row of the table at a time as the bits of one number (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & places.get(word, 0)
        row = (row + match | row - match) & full
    return len(a) - row.bit_count()


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "contains": contains,
    "regex": regex,
    "number": number,
    "rouge": rouge,
}


def best(metric: str, output: str, answers: Sequence[str]) -> float:
    """The score against the answer that fits best."""
    return max(METRICS[metric](output, answer) for answer in answers)
