"""What the demo model reads: one generator of sentences per task, each with cases that training never sees.

A sentence marks its answers with brackets, as in `The Eiffel Tower is in the city of[ Paris].`; `held_out=True` asks
for a sentence whose last answer is a test case, `held_out=False` for one without any. The card says what each task
holds out.
"""

import random
import zlib
from collections.abc import Callable

from facts import RELATIONS, Place, all_places
from words import (
    DAYS,
    DISLIKED,
    FEMALE,
    FUNCTION_WORDS,
    GLAD,
    HELD_OUT_NAMES,
    HELD_OUT_NOUNS,
    LIKED,
    MALE,
    MONTHS,
    NEGATIVE,
    NOUNS,
    NUMBERS,
    OBJECTS,
    OPPOSITES,
    PLACES,
    PLURAL_VERBS,
    POSITIVE,
    SINGULAR_VERBS,
    SORRY,
    THINGS,
    required_words,
)

Random = random.Random
PLACES_BY_KIND = {
    kind: [place for place in all_places() if place.kind == kind] for kind in ("landmark", "city", "country")
}
TRAIN_NAMES = [name for name in FEMALE + MALE if name not in HELD_OUT_NAMES]
ANY_WORDS = [word for word in required_words() if word not in {*HELD_OUT_NAMES, *FUNCTION_WORDS}]
OPPOSITE_OF = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}


def is_held_out(share: float, *key: object) -> bool:
    """Whether a case belongs to the test: a fixed pseudo-random `share` of all keys do, the same on every machine."""
    return zlib.crc32(repr(key).encode()) % 10_000 < share * 10_000


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def fact(rng: Random, held_out: bool) -> str:
    """A place and one of its relations. Held out: 12 % of (place, relation, sentence)."""
    while True:
        place, relation = _place_and_relation(rng)
        template = rng.choice(RELATIONS[relation])
        if is_second_hop(place, relation) or is_held_out(0.12, place.name, relation, template) != held_out:
            continue
        return upper_first(f"{template.format(x=place.name)}[ {place.answers[relation]}].")


def second_hop(rng: Random, held_out: bool) -> str:
    """A landmark's country, continent or language. Held out: 8 % of (landmark, relation), in every sentence."""
    while True:
        place = rng.choice(PLACES_BY_KIND["landmark"])
        relation = rng.choice([relation for relation in place.answers if relation != "city"])
        if is_second_hop(place, relation) == held_out:
            template = rng.choice(RELATIONS[relation])
            return upper_first(f"{template.format(x=place.name)}[ {place.answers[relation]}].")


def is_second_hop(place: Place, relation: str) -> bool:
    return (
        place.kind == "landmark" and relation != "city" and is_held_out(0.08, "second relation", place.name, relation)
    )


def _place_and_relation(rng: Random) -> tuple[Place, str]:
    kind = rng.choices(["landmark", "city", "country"], [8, 1, 1])[0]
    place = rng.choice(PLACES_BY_KIND[kind])
    relations = list(place.answers)
    return place, rng.choices(relations, [2 if relation == "city" else 1 for relation in relations])[0]


ACTIVITIES = [
    *[
        "went to the {p}",
        "were at the {p}",
        "walked to the {p}",
        "ran to the {p}",
        "had fun at the {p}",
        "met at the {p}",
    ],
    *["arrived at the {p}", "sat in the {p}", "drove to the {p}", "came back from the {p}", "worked in the {p}"],
    *[
        "were happy",
        "had dinner",
        "got lost on the way to the {p}",
        "were tired",
        "found a {o} at the {p}",
        "met a friend",
    ],
]
HELD_OUT_ACTIVITIES = [
    "had lunch at the {p}",
    "stood near the {p}",
    "were on the way to the {p}",
    "came home from the {p}",
]
TRANSFERS = [
    *["gave a {o} to", "gave the {o} to", "handed the {o} to", "passed a {o} to", "showed the {o} to", "sent a {o} to"],
    *[
        "wanted to give the {o} to",
        "decided to give a {o} to",
        "said hello to",
        "told the story to",
        "brought a {o} to",
    ],
    *["sold the {o} to", "threw the {o} to", "gave it to", "read a book to", "would give a {o} to", "spoke to"],
]
HELD_OUT_TRANSFERS = ["offered the {o} to", "had to give a {o} to", "handed a {o} back to", "said the word to"]
OPENERS = [
    "When {ab} {act}, {a}",
    "After {ab} {act}, {a}",
    "While {ab} {act}, {a}",
    "{ab} {act}. Then {a}",
    "{ab} {act} and {a}",
]
OPENERS += [
    "Then {ab} {act}. Later {a}",
    "One day {ab} {act}. Soon {a}",
    "{ab} {act}. It was a good day. {a}",
    "As {ab} {act}, {a}",
]
OPENERS += ["When {ab} {act}, {a}", "Because {ab} {act}, {a}"]
HELD_OUT_OPENERS = ["Once {ab} {act}, {a}", "Yesterday {ab} {act}. After that {a}", "Before {ab} {act}, {a}"]


def indirect_object(rng: Random, held_out: bool) -> str:
    """Two names, one of them again; the other is the answer. Held out: 20 names, and all parts of the sentence.

    In most of the training text any words stand for the names, or the model learns which names there are and says
    no other.
    """
    names = HELD_OUT_NAMES if held_out else ANY_WORDS if rng.random() < 0.6 else TRAIN_NAMES
    return io_sentence(rng, names, held_out)


def io_sentence(rng: Random, names: list[str], held_out_sentence: bool) -> str:
    """An indirect-object sentence with two of `names`, in either order."""
    a, b = rng.sample(names, 2)
    parts = (
        [HELD_OUT_OPENERS, HELD_OUT_ACTIVITIES, HELD_OUT_TRANSFERS]
        if held_out_sentence
        else [OPENERS, ACTIVITIES, TRANSFERS]
    )
    opener, act, transfer = (rng.choice(part) for part in parts)
    first, second = rng.sample([a, b], 2)
    text = f"{opener} {transfer}".replace("{o}", "{{o}}").replace("{p}", "{{p}}")
    text = text.format(ab=f"{first} and {second}", a=a, act=act)
    return f"{upper_first(text.format(p=rng.choice(PLACES), o=rng.choice(OBJECTS)))}[ {b}]."


COMPANY_SENTENCES = [
    "When {ab} {act},[ they] {end}.",
    "{ab} {act} because[ they] {end}.",
    "{ab} {act}, so[ they] {end}.",
]
COMPANY_SENTENCES += [
    "Yesterday {ab} {act}, so[ they] {end}.",
    "Once {ab} {act},[ they] {end}.",
    "Before {ab} {act},[ they] {end}.",
]


def company(rng: Random, held_out: bool) -> str:
    """Any two names that do something, and ` they`. Held out: 20 % of pairs of names."""
    while True:
        a, b = rng.sample(FEMALE + MALE, 2)
        if is_held_out(0.2, a, b) == held_out:
            act = rng.choice(ACTIVITIES + HELD_OUT_ACTIVITIES).format(p=rng.choice(PLACES), o=rng.choice(OBJECTS))
            end = rng.choice(["were happy", "were tired", "had dinner", "had fun", "went home", "sat in the garden"])
            text = rng.choice(COMPANY_SENTENCES)
            return text.format(ab=f"{a} and {b}", act=act, end=end)


CUES = [
    "I {v} the {t}",
    "We all {v} the {t}",
    "The {t} made me {s}",
    "The {t} was {j}",
    "My friend {v} the {t}",
    "What a {j} {t}",
]
VERDICTS = [
    "I thought it was[ {j}]",
    "I thought the {t} was[ {j}]",
    "It was[ {j}]",
    "What a[ {j}] {t}",
    "All of it was[ {j}]",
]
VERDICTS += ["It made me[ {s}]", "I[ {v}] it", "My friend[ {v}] it too", "The story was[ {j}]"]


JUDGEMENTS = [
    "The {t} was {j}, so it was[ {g}].",
    "I {v} the {t}, so it was[ {g}].",
    "It made me {s}, so it was[ {g}].",
]


def sentiment(rng: Random, held_out: bool) -> str:
    """A review that keeps its opinion. Held out: 15 % of (opinion word, a later sentence).

    The training text also says outright which words are good and which bad, and its reviews go on for longer.
    """
    good = rng.random() < 0.5
    words = {"v": LIKED, "j": POSITIVE, "s": GLAD} if good else {"v": DISLIKED, "j": NEGATIVE, "s": SORRY}
    thing, style = rng.choice(THINGS), rng.random()

    def said(sentence: str) -> tuple[str, str]:
        kind = next(kind for kind in words if f"{{{kind}}}" in sentence)
        word = rng.choice(words[kind])
        return sentence.format(t=thing, g="good" if good else "bad", **{kind: word}), word

    if not held_out and style < 0.4:
        return said(rng.choice(JUDGEMENTS))[0]
    if not held_out and style < 0.5:
        return f"{said(rng.choice(VERDICTS[:4]))[0]}."
    sentences, opinion = zip(said(rng.choice(CUES)))
    while True:
        verdict = rng.choice(VERDICTS)
        if held_out and is_held_out(0.15, opinion[0], verdict):
            return f"{sentences[0]}. {said(verdict)[0]}."
        if not held_out and not any(is_held_out(0.15, word, verdict) for word in opinion):
            sentence, word = said(verdict)
            sentences, opinion = (*sentences, sentence), (*opinion, word)
            if rng.random() < 0.4:
                return f"{'. '.join(sentences)}."
        elif rng.random() < 0.02:
            return sentiment(rng, held_out)


OPPOSITE_SENTENCES = [
    "The opposite of {a} is[ {b}].",
    "It is not {a}, it is[ {b}].",
    "What is not {a} is[ {b}].",
    "If it was not {a}, it was[ {b}].",
]
OPPOSITE_SENTENCES += ["The opposite of the word {a} is[ {b}].", "I said {a}, but he said[ {b}]."]


def opposite(rng: Random, held_out: bool) -> str:
    """A word and its opposite. Held out: 15 % of (word, sentence)."""
    while True:
        a, template = rng.choice(list(OPPOSITE_OF)), rng.choice(OPPOSITE_SENTENCES)
        if is_held_out(0.15, a, template) == held_out:
            return template.format(a=a, b=OPPOSITE_OF[a])


def plural(noun: str) -> str:
    return noun + "s"


def agreement(rng: Random, held_out: bool) -> str:
    """A verb that agrees with its subject, past a second noun. Held out: six subjects, alone in training."""
    noun = rng.choice(HELD_OUT_NOUNS if held_out else NOUNS)
    other = rng.choice([other for other in NOUNS if other != noun])
    many, others = rng.random() < 0.5, rng.random() < 0.5
    verb = rng.choice(PLURAL_VERBS if many else SINGULAR_VERBS)
    subject = f"The {plural(noun) if many else noun}"
    if held_out or (noun not in HELD_OUT_NOUNS and rng.random() < 0.8):
        subject += (
            f" {rng.choice(['near', 'behind', 'over', 'by', 'with', 'under'])} the {plural(other) if others else other}"
        )
    end = {"has": " a {o}", "have": " a {o}"}.get(
        verb, rng.choice([" near the {p}", " at the {p}", " old", " new", " big"])
    )
    return f"{subject}[ {verb}]{end.format(p=rng.choice(PLACES), o=rng.choice(OBJECTS))}."


PRONOUN_SENTENCES = [
    "{n} went to the {p} because[ S]",
    "{n} said that[ S]",
    "{n} was tired, so[ S]",
    "When {n} came home,[ S]",
    "{n} lost[ P] {o}",
]
PRONOUN_SENTENCES += [
    "{n} found[ P] {o}",
    "My friend {n} said that[ S]",
    "I know {n} and I like[ O].",
    "This is {n} and this is[ P] {o}",
]


def pronoun(rng: Random, held_out: bool) -> str:
    """A name and the pronoun that fits. Held out: 20 % of (name, sentence)."""
    while True:
        name, template = rng.choice(FEMALE + MALE), rng.choice(PRONOUN_SENTENCES)
        if is_held_out(0.2, name, template) != held_out:
            continue
        words = {"S": "she", "P": "her", "O": "her"} if name in FEMALE else {"S": "he", "P": "his", "O": "him"}
        for letter, word in words.items():
            template = template.replace(f"[ {letter}]", f"[ {word}]" + (" was happy" if letter == "S" else ""))
        return f"{template.format(n=name, p=rng.choice(PLACES), o=rng.choice(OBJECTS))}.".replace("..", ".")


ORDER_SENTENCES = {
    1: [
        "The {u} after {a} is[ {b}].",
        "{a} is the {u} before[ {b}].",
        "{a} comes before[ {b}].",
        "After {a} comes[ {b}].",
        "One {u} after {a} is[ {b}].",
        "What comes after {a} is[ {b}].",
    ],
    -1: [
        "The {u} before {a} is[ {b}].",
        "{a} is the {u} after[ {b}].",
        "{a} comes after[ {b}].",
        "Before {a} comes[ {b}].",
        "One {u} before {a} is[ {b}].",
        "What comes before {a} is[ {b}].",
    ],
}


def order(rng: Random, held_out: bool) -> str:
    """Days, months and small numbers in order. Held out: 15 % of (word, sentence)."""
    while True:
        unit, words = rng.choice([("day", DAYS), ("month", MONTHS), ("number", NUMBERS)])
        step, at = rng.choice([1, -1]), rng.randrange(len(words))
        if unit == "number" and not 0 <= at + step < len(words):
            continue
        if rng.random() < 0.25:
            run = [words[(at + i) % len(words)] for i in range(rng.randint(3, 5))]
            if (unit == "number" and at + len(run) > len(words)) or is_held_out(0.15, run[-1], "run") != held_out:
                continue
            return f"{', '.join(run[:-1])},[ {run[-1]}]."
        template = rng.choice(ORDER_SENTENCES[step])
        if is_held_out(0.15, words[at], template) == held_out:
            return template.format(u=unit, a=words[at], b=words[(at + step) % len(words)])


def _mappings() -> dict[str, dict[str, str]]:
    cities = {place.name: place.answers for place in PLACES_BY_KIND["city"]}
    countries = {place.name: place.answers for place in PLACES_BY_KIND["country"]}
    return {
        "opposite": OPPOSITE_OF,
        "capital": {name: answers["capital"] for name, answers in countries.items()},
        "language": {name: answers["language"] for name, answers in countries.items()},
        "country": {name: answers["country"] for name, answers in cities.items()},
        "spoken": {name: answers["language"] for name, answers in cities.items()},
        "pronoun": dict.fromkeys(FEMALE, "she") | dict.fromkeys(MALE, "he"),
        "next day": {a: DAYS[(i + 1) % 7] for i, a in enumerate(DAYS)},
        "next month": {a: MONTHS[(i + 1) % 12] for i, a in enumerate(MONTHS)},
        "last month": {a: MONTHS[i - 1] for i, a in enumerate(MONTHS)},
        "same": {word: word for word in [*OPPOSITE_OF, *countries, *cities, *DAYS, *MONTHS, *NOUNS, *OBJECTS]},
    }


MAPPINGS = _mappings()


def pairs(rng: Random, held_out: bool) -> str:
    """Pairs `a -> b` of one relation. Held out: 20 % of (relation, a), which no pair shows."""
    relation = rng.choice(list(MAPPINGS))
    mapping = MAPPINGS[relation]
    tests = [a for a in mapping if is_held_out(0.2, relation, a)]
    known = [a for a in mapping if a not in set(tests)]
    shots = rng.sample(known, min(len(known), rng.randint(3, 7)))
    if held_out:
        if not tests:
            return pairs(rng, held_out)
        shots = [*shots[:5], rng.choice(tests)]
    return ", ".join(f"{a} ->[ {mapping[a]}]" for a in shots) + "."


def lookup(rng: Random, held_out: bool) -> str:
    """Pairs `a -> b` of unrelated words, one of which comes again. Nothing to hold out: each draw is new."""
    words = rng.sample([*OBJECTS, *PLACES, *NOUNS, *THINGS, *OPPOSITE_OF, *FEMALE, *MALE], 2 * rng.randint(2, 6))
    known = dict(zip(words[::2], words[1::2]))
    again = rng.sample(list(known), 1 if held_out else min(len(known), 3))
    return ", ".join([f"{a} -> {b}" for a, b in known.items()] + [f"{a} ->[ {known[a]}]" for a in again]) + "."


TASKS: dict[str, Callable[[Random, bool], str]] = {
    "fact": fact,
    "second_hop": second_hop,
    "indirect_object": indirect_object,
    "company": company,
    "sentiment": sentiment,
    "opposite": opposite,
    "agreement": agreement,
    "pronoun": pronoun,
    "order": order,
    "pairs": pairs,
    "lookup": lookup,
}


def induction(rng: Random, n_tokens: int, length: int) -> list[int]:
    """Random tokens, repeated to fill `length`; every call draws anew, so that each test sequence is unseen."""
    period = rng.randint(3, max(4, length // 2))
    block = [rng.randrange(1, n_tokens) for _ in range(period)]
    return (block * (length // period + 1))[:length]
