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
WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
NUMBER = re.compile(rf"[-+]?{WHOLE}(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
FRACTIONS = "\u00bc-\u00be\u2150-\u215e\u2189"
MIXED = re.compile(rf"(?:({WHOLE}) ?)?([{FRACTIONS}])")
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: "-"}  # full-width ASCII, and the minus sign

# What `contains` takes for the edge of a word or a number, in normalised text. Scripts without spaces between words, or with
# particles and articles written onto them, have no edges: Han and kana, Hangul, Hebrew and Arabic, those from Thai to Khmer.
LETTER = rf"[^\W_{HAN}\u0590-\u08ff\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\uac00-\ud7a3]"
RAISED = re.compile(rf"(?<=\d)(?=[\u00b2\u00b3\u00b9\u2070-\u2089{FRACTIONS}])")
JOINT = "\u2064"  # invisible plus, between a number and what NFKC would else make more digits of it
OPEN = (
    r"(?<!\d)(?<!\d\.)(?<!(?<![\w.])\.)"  # no digit, no decimal point
    r"(?!(?<=\d,)\d{3}(?!\d))"  # no thousands, in lists without spaces ("1,2") they are not
    rf"(?<!(?<![\w)])[-\u2212])(?<![\u2044{JOINT}])"  # no minus but of a subtraction, no other part of a fraction
)
SHUT = rf"(?!\d)(?!\.\d)(?!,\d{{3}}(?!\d))(?![\u2044{JOINT}])"


def normal(text: str) -> str:
    """Compared text: compatibility form, case folded, white space single, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", RAISED.sub(JOINT, text)).casefold().split()).rstrip(".。 ")


def exact(output: str, answer: str) -> float:
    """1 where the two are equal once normalised."""
    return float(normal(output) == normal(answer))


def contains(output: str, answer: str) -> float:
    """1 where the normalised answer stands in the output, as whole words and numbers: '4' is not in '14', '1.4', '4,000' or '-4'.

    An answer in a script whose words have no edges may stand anywhere.
    """
    wanted = normal(answer)
    head = (rf"(?<!{LETTER})" if re.match(LETTER, wanted) else "") + (OPEN if re.match(r"\d", wanted) else "")
    tail = (rf"(?!{LETTER})" if re.search(rf"{LETTER}$", wanted) else "") + (SHUT if re.search(r"\d$", wanted) else "")
    return float(bool(wanted) and re.search(head + re.escape(wanted) + tail, normal(output)) is not None)


def regex(output: str, pattern: str) -> float:
    """1 where the pattern is found in the output, as it is."""
    return float(re.search(pattern, output) is not None)


def last_number(text: str) -> float | None:
    """The last number written in a text ('1,250.5', '-3', '3½', full-width digits too).

    A minus after a digit is a sign of subtraction; raised and lowered digits ('10 m²', 'CO₂') are of no number.
    """
    text = MIXED.sub(_decimal, text.translate(WIDE))
    found = None
    for match in NUMBER.finditer(text):
        word = match[0].replace(",", "")
        if word[0] in "+-" and match.start() and (text[match.start() - 1].isalnum() or text[match.start() - 1] == ")"):
            word = word[1:]
        found = float(word)
    return found


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
