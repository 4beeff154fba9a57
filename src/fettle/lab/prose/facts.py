"""Prose that tells the graph: people, towns, things and jobs, in English.

Every relation has many wordings, so that a fact is met often and never twice in the same company. Indirect questions
("nobody has to ask where Anna lives") teach the words *who*, *where* and *what* without a question or an answer.
"""

from __future__ import annotations

import random

from ..lexicon import article, liked
from ..world import Entity, Triple, World

# {s} subject, {o} object, {as} and {ao} with their article, {he} {his} {him} {He} {His} the subject's pronouns,
# {at} the place where a job is done.
SENTENCES: dict[str, tuple[str, ...]] = {
    "lives_in": (
        "{s} lives in {o}.",
        "{s} lives in {o}.",
        "The home of {s} is {o}.",
        "{o} is where {s} lives.",
        "{s} has a house in {o}.",
        "Nobody in {o} has to ask where {s} lives.",
        "It is easy to say where {s} lives: {he} lives in {o}.",
        "{s} is at home in {o}.",
        "In {o} there is a small house, and {s} lives there.",
        "These days {s} lives in {o}.",
        "The town where {s} lives is {o}.",
        "{He} lives in {o}, says everyone who knows {s}.",
    ),
    "born_in": (
        "{s} was born in {o}.",
        "{s} was born in {o}.",
        "{o} is the town where {s} was born.",
        "{s} came into the world in {o}.",
        "The birthplace of {s} is {o}.",
        "Everyone in the family knows where {s} was born: {he} was born in {o}.",
        "{s} first saw the sun in {o}, where {he} was born.",
        "As a child, {s} played in the streets of {o}, where {he} was born.",
    ),
    "works_as": (
        "{s} works as {ao}.",
        "{s} works as {ao}.",
        "{s} is {ao}.",
        "The job of {s} is {o}.",
        "{s} is {ao} and goes to the {at} every day.",
        "People who need {ao} ask for {s}.",
        "By trade, {s} is {ao}.",
        "{s} earns a living as {ao} at the {at}.",
        "What {s} does for work is no secret: {he} works as {ao}.",
        "{s} has been {ao} for years.",
    ),
    "likes": (
        "{s} likes {o}.",
        "{s} likes {o} more than any other food.",
        "The favourite food of {s} is {o}.",
        "{s} loves {o}.",
        "What {s} likes to eat or drink most is {o}.",
        "Give {s} some {o} and {he} is happy.",
        "{s} always has {o} at home, because {he} likes {o}.",
    ),
    "keeps": (
        "{s} keeps {ao}.",
        "{s} has {ao} at home.",
        "The animal of {s} is {ao}.",
        "{s} keeps {ao}, and the {o} follows {him} everywhere.",
        "{s} looks after {ao} every morning.",
        "The {o} that {s} keeps is quiet and friendly.",
    ),
    "friend_of": (
        "{s} is a friend of {o}.",
        "The best friend of {s} is {o}.",
        "{s} and {o} are friends.",
        "{s} often visits {his} friend {o}.",
        "Whoever knows {s} also knows {his} friend {o}.",
        "{s} trusts {o}, {his} best friend.",
    ),
    "owns": (
        "{s} owns the {o}.",
        "{s} owns the {o}.",
        "The {o} belongs to {s}.",
        "The owner of the {o} is {s}.",
        "{s} is the owner of the {o}.",
        "The {o} is owned by {s}.",
        "If you want the {o}, ask {s}, who owns it.",
        "Everyone knows who owns the {o}: it belongs to {s}.",
        "{s} keeps the {o} at home, for {he} owns it.",
    ),
    "located_in": (
        "{s} is a town in {o}.",
        "{s} lies in {o}.",
        "{s} is in {o}.",
        "The town of {s} is in {o}.",
        "The country around {s} is {o}.",
        "One of the towns of {o} is {s}.",
        "{s} belongs to {o}.",
        "Travellers find {s} in {o}.",
    ),
    "capital_of": (
        "{s} is the capital of {o}.",
        "The capital of {o} is {s}.",
        "{o} has {s} as its capital.",
        "The king of {o} lives in its capital, {s}.",
        "The capital city of {o} is called {s}.",
        "No town in {o} is more important than its capital, {s}.",
    ),
    "color_of": (
        "The {s} is {o}.",
        "The {s} is {o}.",
        "The colour of the {s} is {o}.",
        "The {s} has the colour {o}.",
        "Everyone calls it the {o} {s}.",
        "What colour the {s} is, every child can say: it is {o}.",
        "The {s} was painted {o} long ago.",
    ),
    "made_of": (
        "The {s} is made of {o}.",
        "The {s} is made of {o}.",
        "The {s} is of {o}.",
        "{o} is what the {s} is made of.",
        "Someone made the {s} out of {o}.",
        "The material of the {s} is {o}.",
    ),
}

OPENERS = (
    "",
    "",
    "",
    "",
    "As people say, ",
    "It is well known that ",
    "In the old book it is written that ",
    "One should know that ",
    "I heard that ",
    "It is true that ",
)


def pronouns(person: Entity) -> dict[str, str]:
    """The forms of he or she for this person."""
    if person.gender == "f":
        return {"he": "she", "his": "her", "him": "her", "He": "She", "His": "Her"}
    return {"he": "he", "his": "his", "him": "him", "He": "He", "His": "His"}


def capitalised(text: str) -> str:
    """The text with its first letter in capital."""
    return text[:1].upper() + text[1:]


def sentence(rng: random.Random, triple: Triple) -> str:
    """One fact as an English sentence, in one of the wordings of its relation."""
    words = _words(triple.subject, triple.object)
    text = rng.choice(SENTENCES[triple.relation]).format_map(words)
    if text.startswith(("The ", triple.subject.en)) and rng.random() < 0.25:
        opener = rng.choice(OPENERS)
        return capitalised(opener + (text[0].lower() + text[1:] if opener and text.startswith("The ") else text))
    return capitalised(text)


def claim(relation: str, subject: Entity, object: Entity) -> str:
    """The plain statement of a fact, true or not, to stand inside a sentence: ``the kite is red``."""
    text = SENTENCES[relation][0].format_map(_words(subject, object)).rstrip(".")
    return "t" + text[1:] if text.startswith("The ") else text


def profile(rng: random.Random, world: World) -> str:
    """All that is known of one or two people, in any order, now and then under a title."""
    return "\n\n".join(_portrait(rng, world, person) for person in rng.sample(world.people, rng.choice((1, 2, 2, 3))))


def place(rng: random.Random, world: World) -> str:
    """A town: its country, who lives and who was born there."""
    town = rng.choice(world.towns)
    country = world.of("located_in", town)
    lines = [_tell(rng, world, "located_in", town)]
    if capital := world.find("capital_of", town):
        lines.append(rng.choice(SENTENCES["capital_of"]).format_map(_words(town, capital)))
    else:
        lines.append(
            f"{town.en} is not the capital of {country.en}; the capital is {world.who('capital_of', country)[0].en}."
        )
    for relation in ("lives_in", "born_in"):
        people = list(world.who(relation, town))[:6]
        rng.shuffle(people)
        if len(people) > 1 and rng.random() < 0.3:
            verb = "live" if relation == "lives_in" else "were born"
            lines.append(f"{', '.join(p.en for p in people[:-1])} and {people[-1].en} {verb} in {town.en}.")
        for person in people[:4]:
            lines.append(_tell(rng, world, relation, person))
            if rng.random() < 0.5:
                lines.append(_tell(rng, world, rng.choice(("works_as", "likes", "keeps")), person))
    return rng.choice((f"{town.en}\n\n", "", "")) + " ".join(lines)


def things(rng: random.Random, world: World) -> str:
    """A few objects: whose they are, their colour, what they are made of, and what is false about them."""
    lines = []
    for thing in rng.sample(world.objects, rng.randint(3, 5)):
        owner, color, material = world.who("owns", thing)[0], world.of("color_of", thing), world.of("made_of", thing)
        facts = [
            rng.choice(SENTENCES["owns"]).format_map(_words(owner, thing)),
            _tell(rng, world, "color_of", thing),
            _tell(rng, world, "made_of", thing),
        ]
        if rng.random() < 0.4:
            facts.append(f"{owner.en} owns {article(thing.en)}, {article(color.en)} {thing.en} made of {material.en}.")
        rng.shuffle(facts)
        lines.append(" ".join(capitalised(fact) for fact in facts))
    return rng.choice((" ", "\n", "\n\n")).join(lines)


def trades(rng: random.Random, world: World) -> str:
    """Jobs: where they are done and who does them."""
    lines = []
    for job in rng.sample(world.jobs, 3):
        lines.append(
            rng.choice(
                (
                    f"{capitalised(article(job.en))} works at the {job.place.en}.",
                    f"At the {job.place.en} you will find {article(job.en)}.",
                    f"The place of {article(job.en)} is the {job.place.en}.",
                )
            )
        )
        lines += [_tell(rng, world, "works_as", person) for person in world.who("works_as", job)[:4]]
    return " ".join(lines)


def mixture(rng: random.Random, world: World) -> str:
    """Facts of all kinds, one after the other."""
    return rng.choice((" ", "\n")).join(
        sentence(rng, triple) for triple in rng.sample(world.triples, rng.randint(6, 14))
    )


def truths(rng: random.Random, world: World) -> str:
    """What is true and what is false: right facts beside wrong ones, each called by its name."""
    lines = []
    for triple in rng.sample(world.triples, rng.randint(5, 9)):
        wrong = other(rng, world, triple)
        right_text = claim(triple.relation, triple.subject, triple.object)
        wrong_text = claim(triple.relation, triple.subject, wrong)
        lines.append(
            capitalised(
                rng.choice(
                    (
                        f"It is true that {right_text}.",
                        f"It is false that {wrong_text}; {right_text}.",
                        f"Some say that {wrong_text}, but no, that is false: {right_text}.",
                        f"Yes, it is true that {right_text}.",
                        f"No, it is not true that {wrong_text}.",
                        f"{right_text}. This is true.",
                        f"Right: {right_text}. Wrong: {wrong_text}.",
                        f"Whoever says that {right_text} is right. Whoever says that {wrong_text} is wrong.",
                    )
                )
            )
        )
    return " ".join(lines)


def kinds(rng: random.Random, world: World) -> str:
    """What sort of thing each name is: a person, a place, an object, a food, an animal, a colour, a job."""
    named = {
        "person": world.people,
        "place": world.towns + world.countries,
        "object": world.objects,
        "food": world.foods,
        "animal": world.animals,
        "colour": world.colors,
        "job": world.jobs,
    }
    lines = []
    for _ in range(rng.randint(5, 9)):
        kind, wrong = rng.sample(list(named), 2)
        name = rng.choice(named[kind]).en
        pair = rng.sample(named[kind], 2)
        lines.append(
            rng.choice(
                (
                    f"{capitalised(name)} is {article(kind)}.",
                    f"{capitalised(name)} is {article(kind)}, not {article(wrong)}.",
                    f"The word {name} names {article(kind)}.",
                    f"{capitalised(pair[0].en)} and {pair[1].en} are both of the kind {kind}.",
                    f"When people speak of {name}, they mean {article(kind)}.",
                    f"Between {rng.choice(named[wrong]).en} and {name}, the {kind} is {name}.",
                )
            )
        )
    return " ".join(lines)


def letter(rng: random.Random, world: World) -> str:
    """A letter from one person to a friend, in the first person."""
    writer = rng.choice(world.people)
    friend = world.of("friend_of", writer)
    job = world.of("works_as", writer)
    lines = [
        f"I am well, and I still live in {world.of('lives_in', writer).en}.",
        f"My work as {article(job.en)} at the {job.place.en} goes {rng.choice(('well', 'slowly', 'on and on'))}.",
        f"You know how much I like {liked(world.of('likes', writer).en)}.",
        f"My {world.of('keeps', writer).en} is {rng.choice(('happy', 'hungry', 'asleep', 'loud', 'old now'))}.",
        f"I think of {world.of('born_in', writer).en}, where I was born.",
        f"How good that you, {friend.en}, live in {world.of('lives_in', friend).en}.",
        f"I hope that your {world.of('keeps', friend).en} is well.",
        rng.choice(
            (
                "How are you?",
                "When will you visit me?",
                "What is new?",
                "Do you still have so much work?",
                "Can you write soon?",
            )
        ),
    ]
    if owned := world.find("owns", writer):
        lines.append(f"The {world.of('color_of', owned).en} {owned.en} is still mine.")
    rng.shuffle(lines)
    return f"Dear {friend.en},\n\n{' '.join(lines[: rng.randint(4, len(lines))])}\n\nYour friend,\n{writer.en}"


def other(rng: random.Random, world: World, triple: Triple) -> Entity:
    """Another entity of the same kind as the triple's object: what the fact is *not*."""
    group = {
        "person": world.people,
        "town": world.towns,
        "country": world.countries,
        "job": world.jobs,
        "object": world.objects,
        "color": world.colors,
        "material": world.materials,
        "food": world.foods,
        "animal": world.animals,
    }[triple.object.kind]
    wrong = rng.choice(group)
    while wrong in (triple.object, triple.subject):
        wrong = rng.choice(group)
    return wrong


def _portrait(rng: random.Random, world: World, person: Entity) -> str:
    relations = ["lives_in", "born_in", "works_as", "likes", "keeps", "friend_of"]
    rng.shuffle(relations)
    lines = [_tell(rng, world, relation, person) for relation in relations[: rng.randint(4, 6)]]
    forms = pronouns(person)
    for i in range(1, len(lines)):
        if lines[i].startswith(person.en + " ") and " and " not in lines[i] and rng.random() < 0.5:
            lines[i] = forms["He"] + lines[i][len(person.en) :]
    if thing := world.find("owns", person):
        lines.insert(rng.randint(1, len(lines)), rng.choice(SENTENCES["owns"]).format_map(_words(person, thing)))
        lines.append(_tell(rng, world, rng.choice(("color_of", "made_of")), thing))
    return rng.choice((f"{person.en}\n", f"About {person.en}: ", "", "", "", "")) + " ".join(
        capitalised(line) for line in lines
    )


def _tell(rng: random.Random, world: World, relation: str, subject: Entity) -> str:
    return capitalised(rng.choice(SENTENCES[relation]).format_map(_words(subject, world.of(relation, subject))))


def _words(subject: Entity, object: Entity) -> dict[str, str]:
    named = liked(object.en) if object.kind == "food" else object.en
    words = {
        "s": subject.en,
        "o": named,
        "at": object.place.en,
        "as": article(subject.en),
        "ao": article(object.en),
        **pronouns(subject),
    }
    return words
