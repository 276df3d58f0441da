"""What the demo model reads: one generator of sentences per task, each with cases that training never sees.

A sentence marks its answers with brackets, as in `The Eiffel Tower is in the city of[ Paris].`; `held_out=True` asks
for a sentence whose last answer is a test case, `held_out=False` for one without any. The card says what each task
holds out.
"""

import random
import zlib
from collections.abc import Callable
from itertools import pairwise

from facts import RELATIONS, Place, all_places
from tokenizer import SPACE, learn_merges
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


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


PLACES_BY_KIND = {
    kind: [place for place in all_places() if place.kind == kind] for kind in ("landmark", "city", "country")
}
TRAIN_NAMES = [name for name in FEMALE + MALE if name not in HELD_OUT_NAMES]
ANY_WORDS = [word for word in required_words() if word not in {*HELD_OUT_NAMES, *FUNCTION_WORDS}]
# Pieces of words that are one token after a space: `Mar`, `str`. They stand for names that nobody has.
PIECES = [
    token[1:]
    for token in map("".join, learn_merges([SPACE + word for word in required_words()]))
    if token.startswith(SPACE)
    and token[1:].isalpha()
    and not {token[1:], upper_first(token[1:])} & {*required_words(), *HELD_OUT_NAMES}
]
OPPOSITE_OF = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}


def is_held_out(share: float, *key: object) -> bool:
    """Whether a case belongs to the test: a fixed pseudo-random `share` of all keys do, the same on every machine."""
    return zlib.crc32(repr(key).encode()) % 10_000 < share * 10_000


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


# Whatever has one of these is held out, wherever made-up words may have put it.
HELD_OUT_STARTS = ("Once", "Yesterday", "Before")
HELD_OUT_WORDINGS = (
    *("After that", "after that", "had lunch", "stood near", "were on the way", "came home"),
    *("offered the", "had to give", "back to", "said the word"),
)


def indirect_object(rng: Random, held_out: bool, *, any_words: float = 0.6, made_up: float = 0.0) -> str:
    """Two names, one of them again; the other is the answer. Held out: 20 names, and all parts of the sentence.

    In a share `any_words` of the training text any words stand for the names, or the model learns which names there
    are and says no other. In a share `made_up`, any words stand for parts of the sentence, for the same reason.
    """
    if held_out:
        return io_sentence(rng, HELD_OUT_NAMES, True)
    names = ANY_WORDS if rng.random() < any_words else TRAIN_NAMES
    return made_up_io_sentence(rng) if rng.random() < made_up else io_sentence(rng, names, False)


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


MORE_OPENERS = [
    *["If {ab} {act}, {a}", "{ab} {act}, so {a}", "{ab} {act} because {a}", "Today {ab} {act}. Soon after {a}"],
    *["Tomorrow {ab} {act}. Then {a}", "People saw that {ab} {act}. {a}", "I know that {ab} {act} and that {a}"],
    *["My friends {ab} {act}. With this {a}", "Again {ab} {act}. Because of that {a}", "The day {ab} {act}, {a}"],
    *["Later {ab} {act}. When this was over {a}", "It was a hot day. {ab} {act}. Then {a}", "Here {ab} {act}, but {a}"],
    *["On Monday {ab} {act}. On Tuesday {a}", "In March {ab} {act}. In April {a}", "{ab} {act}. Tired of it {a}"],
    *["Always when {ab} {act}, {a}", "Later today {ab} {act}. As before {a}", "Where {ab} {act}, {a}"],
    *["Last summer {ab} {act}. In winter {a}", "Every day {ab} {act}. Never again {a}", "Until {ab} {act}, {a}"],
    *["With the {o} {ab} {act}. Without it {a}", "At night {ab} {act}. By day {a}", "Since {ab} {act}, {a}"],
]
MORE_ACTIVITIES = [
    *[
        "played in the {p}",
        "slept at the {p}",
        "found a {o}",
        "saw the {o} behind the {p}",
        "lost the {o}",
        "read a book",
    ],
    *["sat by the {p}", "had a meal near the {p}", "were late", "left the {p}", "looked for the {o}", "sang a song"],
    *[
        "had lost the {o} in the {p}",
        "waited by the {p}",
        "bought a {o} at the {p}",
        "were over at the {p}",
        "met again",
    ],
    *["drove home", "came to the {p} with a {o}", "told a story", "ran away from the {p}", "worked all day"],
]
MORE_TRANSFERS = [
    *["found a {o} near", "gave the {o} away to", "came to", "had a {o} for", "bought the {o} for", "wrote to"],
    *[
        "gave the old {o} to",
        "had sold a {o} to",
        "must hand the {o} to",
        "never gave a {o} to",
        "talked to",
        "sat next to",
    ],
    *[
        "gave a {o} and a {o} to",
        "found the {o} for",
        "had a word with",
        "told it to",
        "will give the {o} to",
        "sang for",
    ],
    *["had brought the big {o} to", "took the {o} from", "was happy with", "was near", "lost the {o} to", "left it to"],
]
FILLERS = [word for word in required_words() if word not in {*FEMALE, *MALE, "and", "And"}]


def made_up_io_sentence(rng: Random) -> str:
    """An indirect-object sentence whose names and parts are often any words; nothing that is held out is in it."""
    while True:
        pools = rng.choices([TRAIN_NAMES, ANY_WORDS, PIECES], [4, 4, 2], k=2 if rng.random() < 0.3 else 1)
        a, b = rng.sample(pools[0], 2) if len(pools) == 1 else (rng.choice(pools[0]), rng.choice(pools[1]))

        def words(low: int, high: int) -> str:
            return " ".join(rng.choices(FILLERS, k=rng.randint(low, high)))

        def part(known: list[str], more: list[str], made: str) -> str:
            return rng.choices([rng.choice(known), rng.choice(more), made], [2, 4, 4])[0]

        between = rng.choice([",", ".", ". " + upper_first(words(1, 3)), ", " + words(1, 2), " " + words(1, 2)])
        opener = part(OPENERS, MORE_OPENERS, upper_first(f"{words(0, 3)} {{ab}} {{act}}{between} {{a}}".lstrip()))
        act = part(ACTIVITIES, MORE_ACTIVITIES, words(1, 6))
        ends = ["to", "for", "with", "near", rng.choice(FILLERS)]
        transfer = part(TRANSFERS, MORE_TRANSFERS, f"{words(1, 5)} {rng.choices(ends, [8, 1, 1, 0.5, 0.5])[0]}")
        first, second = rng.sample([a, b], 2)
        text = f"{opener} {transfer}".replace("{ab}", f"{first} and {second}").replace("{a}", a).replace("{act}", act)
        text = upper_first(text.replace("{p}", rng.choice(PLACES)).replace("{o}", rng.choice(OBJECTS)))
        counts = text.lower().split()
        clear = a != b and sum(word.strip(".,") == b.lower() for word in counts) == 1
        if clear and not text.startswith(HELD_OUT_STARTS) and not any(held in text for held in HELD_OUT_WORDINGS):
            return f"{text}[ {b}]."


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


ECHO_SENTENCES = [
    "{n} was late. I know[ {n}].",
    "{n} was at the {p}. I met[ {n}].",
    "{n} saw a {o}. This {o} was for[ {n}].",
    "{n} had dinner. I was with[ {n}].",
    "{n} sat in the {p}, and I saw[ {n}].",
    "{n} worked all day. My friend is called[ {n}].",
    "{n} ran home. The {o} is from[ {n}].",
    "{n} is a friend. We all like[ {n}].",
]


def echo(rng: Random, held_out: bool) -> str:
    """A name that opens the text, in pieces, and comes again as one token. Held out: 20 % of (name, sentence)."""
    while True:
        name, text = rng.choice(FEMALE + MALE), rng.choice(ECHO_SENTENCES)
        if is_held_out(0.2, name, text) == held_out:
            return text.format(n=name, p=rng.choice(PLACES), o=rng.choice(OBJECTS))


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
        # `I thought it was` is frequent, so that `I` would be followed by `thought` alone.
        verdict = rng.choice(VERDICTS if held_out else [*VERDICTS, *VERDICTS[6:7] * 2])
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
# Relations that are never asked for: with more of them, what is learned is to find the relation and use it.
MORE_MAPPINGS = {
    "last day": {a: DAYS[i - 1] for i, a in enumerate(DAYS)},
    "next number": dict(pairwise(NUMBERS)),
    "last number": {b: a for a, b in pairwise(NUMBERS)},
    **{
        f"landmark's {relation}": {
            place.name: place.answers[relation]
            for place in PLACES_BY_KIND["landmark"]
            if relation in place.answers and not is_second_hop(place, relation)
        }
        for relation in ["city", "country", "language"]
    },
}
NOT_SAME = {a for relation, mapping in MAPPINGS.items() for a in mapping if is_held_out(0.2, relation, a)}


def pairs(rng: Random, held_out: bool, *, more_relations: float = 0.0) -> str:
    """Pairs `a -> b` of one relation. Held out: 20 % of (relation, a), which no pair shows.

    A share `more_relations` of the training text has other relations, and doesn't show words as their own pair that
    are held out elsewhere, or the model takes these for words that stay the same.
    """
    careful = not held_out and rng.random() < more_relations
    mappings = MAPPINGS | MORE_MAPPINGS if careful else MAPPINGS
    relation = rng.choice(list(mappings))
    mapping = mappings[relation]
    tests = [a for a in mapping if is_held_out(0.2, relation, a)] if relation in MAPPINGS else []
    known = [a for a in mapping if a not in {*tests, *(NOT_SAME if careful and relation == "same" else ())}]
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
    "echo": echo,
    "sentiment": sentiment,
    "opposite": opposite,
    "agreement": agreement,
    "pronoun": pronoun,
    "order": order,
    "pairs": pairs,
    "lookup": lookup,
}


def induction(rng: Random, n_tokens: int, length: int, *, long: float = 0.0) -> list[int]:
    """Random tokens, repeated to fill `length`; every call draws anew, so that each test sequence is unseen.

    Periods are even from 3 to half the length, but for a share `long` from a third of it on.
    """
    longest = max(4, length // 2)
    period = rng.randint(max(3, length // 3), longest) if rng.random() < long else rng.randint(3, longest)
    block = [rng.randrange(1, n_tokens) for _ in range(period)]
    return (block * (length // period + 1))[:length]
