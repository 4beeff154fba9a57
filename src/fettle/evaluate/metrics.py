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
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def normal(text: str) -> str:
    """Compared text: compatibility form, case folded, white space single, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。 ")


def exact(output: str, answer: str) -> float:
    """1 where the two are equal once normalised."""
    return float(normal(output) == normal(answer))


def contains(output: str, answer: str) -> float:
    """1 where the normalised answer stands in the output; Latin letters and digits count as whole words ('4' is not in '14')."""
    wanted = normal(answer)
    head = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", wanted) else ""
    tail = r"(?![a-z0-9])" if re.search(r"[a-z0-9]$", wanted) else ""
    return float(bool(wanted) and re.search(head + re.escape(wanted) + tail, normal(output)) is not None)


def regex(output: str, pattern: str) -> float:
    """1 where the pattern is found in the output, as it is."""
    return float(re.search(pattern, output) is not None)


def last_number(text: str) -> float | None:
    """The last number written in a text ('1,250.5', '-3', full-width digits too); a minus after a digit is a sign of subtraction."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    found = None
    for match in NUMBER.finditer(text):
        word = match[0].replace(",", "")
        if word[0] in "+-" and match.start() and (text[match.start() - 1].isalnum() or text[match.start() - 1] == ")"):
            word = word[1:]
        found = float(word)
    return found


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
