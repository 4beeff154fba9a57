"""The instruction task families, a file a subject. `FAMILIES` has them all by name; `HELD_OUT` names the clusters never trained on."""

from . import chinese, facts, judging, lists, numbers, texts, words
from .family import UNSEEN_PHRASINGS, Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (facts, numbers, lists, words, texts, chinese, judging)
    for family in module.FAMILIES
}

# Chosen so that what the trained clusters teach carries over: to pick a word of a kind out of a list carries over to a
# sentence; yes and no about numbers and lists, to facts; odd or even, positive or negative, to person or place.
HELD_OUT = ("extraction", "verification", "classification")

__all__ = ["FAMILIES", "HELD_OUT", "UNSEEN_PHRASINGS", "Family"]
