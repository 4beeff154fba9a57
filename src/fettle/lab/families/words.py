"""Sentiment of reviews, translation of words, rewriting of words and sentences."""

from __future__ import annotations

import random

from ..lexicon import COLOURS, OPPOSITES, VERBS, plural
from ..prose.reviews import opinion
from ..world import World
from .family import Family, Maker, Slots


def _sentiment(yes: str, no: str) -> Maker:
    def make(rng: random.Random, world: World) -> tuple[Slots, str]:
        good = rng.random() < 0.5
        return {"text": opinion(rng, world, good)}, yes if good else no

    return make


def _better(rng: random.Random, world: World) -> tuple[Slots, str]:
    first_good = rng.random() < 0.5
    return {
        "one": opinion(rng, world, first_good),
        "two": opinion(rng, world, not first_good),
    }, "first" if first_good else "second"


def _to_chinese(rng: random.Random, world: World) -> tuple[Slots, str]:
    en, zh = rng.choice(world.glossary())
    return {"word": en}, zh


def _to_english(rng: random.Random, world: World) -> tuple[Slots, str]:
    en, zh = rng.choice(world.glossary())
    return {"word": zh}, en


def _phrase(rng: random.Random, world: World) -> tuple[Slots, str]:
    color, noun = rng.choice(COLOURS), rng.choice(world.objects)
    return {"words": f"the {color.en} {noun.en}"}, f"{color.zh}的{noun.zh}"


def _name(rng: random.Random, world: World) -> tuple[Slots, str]:
    entity = rng.choice(world.people + world.towns + world.countries)
    return {"name": entity.en}, entity.zh


def _upper(rng: random.Random, world: World) -> tuple[Slots, str]:
    word = rng.choice(world.objects + world.foods + world.animals + world.colors + world.people + world.towns).en
    return {"word": word}, word.upper()


def _past(rng: random.Random, world: World) -> tuple[Slots, str]:
    person, town, verb = rng.choice(world.people).en, rng.choice(world.towns).en, rng.choice(VERBS)
    return {"text": f"{person} {verb.en} in {town}."}, f"{person} {verb.more[1]} in {town}."


def _swap(rng: random.Random, world: World) -> tuple[Slots, str]:
    left, right = (person.en for person in rng.sample(world.people, 2))
    verb = rng.choice(("helps", "meets", "calls", "visits", "thanks"))
    return {"text": f"{left} {verb} {right}."}, f"{right} {verb} {left}."


def _plural(rng: random.Random, world: World) -> tuple[Slots, str]:
    noun = rng.choice(world.objects + world.animals).en
    return {"word": noun}, plural(noun)


def _opposite(rng: random.Random, world: World) -> tuple[Slots, str]:
    pair = rng.choice(OPPOSITES)
    left, right = rng.sample((pair.en, pair.more[0]), 2)
    return {"word": left}, right


def _repeat(rng: random.Random, world: World) -> tuple[Slots, str]:
    word, times = rng.choice(world.foods + world.animals + world.objects).en, rng.randint(2, 4)
    return {"word": word, "n": str(times)}, " ".join([word] * times)


FAMILIES = (
    Family(
        "sentiment",
        "sentiment",
        "en",
        (
            "Is this review positive or negative? {text}",
            "Decide whether the review is positive or negative: {text}",
            "{text} Is this positive or negative?",
            "Classify the review as positive or negative: {text}",
            "Positive or negative? {text}",
            "Say if this opinion is positive or negative: {text}",
            "What is the opinion here, positive or negative? {text}",
            "Read the review and choose positive or negative. {text}",
        ),
        _sentiment("positive", "negative"),
    ),
    Family(
        "happy",
        "sentiment",
        "en",
        (
            "Is the writer happy? Answer yes or no. {text}",
            "Yes or no: the writer of this review is happy. {text}",
            "{text} Is the writer happy? Answer yes or no.",
            "Answer yes or no: is this a happy customer? {text}",
            "Say yes or no: the review is positive. {text}",
            "Decide with yes or no: is this a good review? {text}",
            "Was it good for the writer? Reply with yes or no. {text}",
            "Yes or no, is this customer happy? {text}",
        ),
        _sentiment("yes", "no"),
    ),
    Family(
        "better_review",
        "sentiment",
        "en",
        (
            "Which review is positive, the first or the second? First: {one} Second: {two}",
            "First: {one} Second: {two} Which one is positive?",
            "Choose first or second: which review is good? First: {one} Second: {two}",
            "First: {one} Second: {two} Say which writer is happy, first or second.",
            "Find the good review, first or second. First: {one} Second: {two}",
            "First or second: where is the customer happy? First: {one} Second: {two}",
            "First: {one} Second: {two} Is the first or the second the better review?",
            "Name the positive one, first or second. First: {one} Second: {two}",
        ),
        _better,
    ),
    Family(
        "to_chinese",
        "translation",
        "en",
        (
            "Translate the word {word} into Chinese.",
            "What is {word} in Chinese?",
            "Give the Chinese word for {word}.",
            "Write {word} in Chinese.",
            "How do you say {word} in Chinese?",
            "Translate into Chinese: {word}",
            "Which Chinese word means {word}?",
            "Say {word} in Chinese.",
        ),
        _to_chinese,
    ),
    Family(
        "to_english",
        "translation",
        "en",
        (
            "Translate the word {word} into English.",
            "What is {word} in English?",
            "Give the English word for {word}.",
            "Write {word} in English.",
            "How do you say {word} in English?",
            "Translate into English: {word}",
            "Which English word means {word}?",
            "What does {word} mean?",
        ),
        _to_english,
    ),
    Family(
        "phrase_to_chinese",
        "translation",
        "en",
        (
            'Translate the words "{words}" into Chinese.',
            'What is "{words}" in Chinese?',
            'Give the Chinese for "{words}".',
            'Write "{words}" in Chinese.',
            'How do you say "{words}" in Chinese?',
            "Translate this into Chinese: {words}",
            'Put "{words}" into Chinese.',
            'Say "{words}" in Chinese.',
        ),
        _phrase,
    ),
    Family(
        "name_to_chinese",
        "translation",
        "en",
        (
            "Write the name {name} in Chinese.",
            "What is the Chinese name of {name}?",
            "Give the Chinese name for {name}.",
            "How is {name} written in Chinese?",
            "Translate the name {name} into Chinese.",
            "Tell me the Chinese for the name {name}.",
            "What do people in China call {name}?",
            "Put the name {name} into Chinese.",
        ),
        _name,
    ),
    Family(
        "uppercase",
        "rewriting",
        "en",
        (
            "Write {word} in capital letters.",
            "Put {word} into capital letters.",
            "Change {word} to capital letters.",
            "Rewrite in capital letters: {word}",
            "What is {word} in capital letters?",
            "Write large: {word}",
            "How does {word} look in capital letters?",
            "Give {word} with capital letters only.",
        ),
        _upper,
    ),
    Family(
        "past",
        "rewriting",
        "en",
        (
            "Put this sentence into the past: {text}",
            "Rewrite in the past: {text}",
            "Change to the past: {text}",
            "Write the sentence as if it was yesterday: {text}",
            "Say this in the past: {text}",
            "It happened yesterday. Rewrite: {text}",
            "How is this sentence in the past? {text}",
            "Tell this as something of long ago: {text}",
        ),
        _past,
    ),
    Family(
        "swap_names",
        "rewriting",
        "en",
        (
            "Exchange the names: {text}",
            "Exchange the two names in this sentence: {text}",
            "Rewrite with the names exchanged: {text}",
            "Write it the other way round: {text}",
            "Change the places of the two people: {text}",
            "Turn the names around: {text}",
            "Write this sentence with the names exchanged: {text}",
            "Let the two people change places: {text}",
        ),
        _swap,
    ),
    Family(
        "plural",
        "rewriting",
        "en",
        (
            "What is the plural of {word}?",
            "Give the plural of {word}.",
            "Write the plural: {word}",
            "Put {word} into the plural.",
            "One {word}, many what?",
            "Change to more than one: {word}",
            "What do you call more than one {word}?",
            "How is the plural of {word} written?",
        ),
        _plural,
    ),
    Family(
        "opposite",
        "rewriting",
        "en",
        (
            "What is the opposite of {word}?",
            "Name the opposite of {word}.",
            "Give the opposite: {word}",
            "Tell me the opposite of {word}.",
            "Write the opposite of {word}.",
            "Which word is the opposite of {word}?",
            "What is not {word}?",
            "Find the opposite for {word}.",
        ),
        _opposite,
    ),
    Family(
        "repeat",
        "rewriting",
        "en",
        (
            "Write the word {word} {n} times.",
            "Say {word} {n} times.",
            "Repeat {word} {n} times.",
            "Give me the word {word} {n} times.",
            "Write {n} times: {word}",
            "Put down the word {word} {n} times.",
            "I want to read {word} {n} times.",
            "Say the word {word} again until you said it {n} times.",
        ),
        _repeat,
    ),
)
