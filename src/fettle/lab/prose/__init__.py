"""The kinds of prose that the corpus is made of, a file a subject; every function is ``(rng, world) -> str``."""

from . import chinese, facts, language, lists, numbers, reviews, school, stories

__all__ = ["chinese", "facts", "language", "lists", "numbers", "reviews", "school", "stories"]
