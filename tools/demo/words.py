"""The words that the demo model's sentences are made of. Every word here is one token with a space before it."""

FEMALE = """Mary Anna Emma Alice Julia Laura Sarah Helen Kate Lucy Grace Rose Jane Ruth Clara Nina Eva Amy Diana Sophie
Olivia Megan Linda Susan Karen Lisa Nancy Betty Carol Donna Emily Chloe Hannah Ella Zoe Ivy Nora Stella Violet Maria
Rachel Claire Molly Paula Tina Wendy""".split()
MALE = """John Tom James Peter Paul Mark David Simon Adam Daniel Henry Jack Oscar Leo Max Ben Sam Luke Noah Oliver
George Frank Kevin Brian Edward Thomas Michael Robert Steven Eric Ryan Jacob Gary Scott Andrew Philip Martin Victor
Alan Bruce Carl Dean Felix Hugo Ian Neil""".split()
# Never in an indirect-object sentence of the training text; they are in its pronouns, reviews and lists.
HELD_OUT_NAMES = """Emma Julia Helen Grace Clara Sophie Linda Emily Nora Rachel
Tom Daniel Oscar Luke Kevin Robert Ryan Philip Carl Felix""".split()

PLACES = "store park school garden station market library beach hospital office restaurant museum church farm".split()
OBJECTS = "drink book ball letter ring key hat flower gift cup bag apple pen map coat lamp".split()

OPPOSITES = [
    *[("hot", "cold"), ("big", "small"), ("up", "down"), ("good", "bad"), ("old", "new"), ("fast", "slow")],
    *[("light", "dark"), ("high", "low"), ("rich", "poor"), ("happy", "sad"), ("strong", "weak"), ("open", "closed")],
    *[("full", "empty"), ("hard", "soft"), ("long", "short"), ("wet", "dry"), ("early", "late"), ("clean", "dirty")],
    *[("near", "far"), ("left", "right"), ("loud", "quiet"), ("thick", "thin"), ("wide", "narrow"), ("young", "adult")],
    *[("true", "false"), ("first", "last"), ("love", "hate"), ("win", "lose"), ("buy", "sell"), ("start", "stop")],
    *[("day", "night"), ("summer", "winter"), ("friend", "enemy"), ("war", "peace"), ("black", "white"), ("in", "out")],
]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()

NOUNS = """dog cat horse bird tree car boat house door table chair king queen teacher doctor boy girl farmer river
flower road picture window lake""".split()
# Subjects of plain sentences only in the training text, never before another noun.
HELD_OUT_NOUNS = "cat bird boat teacher girl river".split()
SINGULAR_VERBS = "is was has".split()
PLURAL_VERBS = "are were have".split()

THINGS = "film book play song show meal game story concert hotel".split()
POSITIVE = "great wonderful lovely excellent amazing brilliant fantastic beautiful superb perfect".split()
NEGATIVE = "awful terrible horrible boring dreadful dull ugly nasty stupid disgusting".split()
LIKED = "loved enjoyed liked adored praised".split()
DISLIKED = "hated disliked detested regretted despised".split()
GLAD = "smile laugh cheer sing dance".split()
SORRY = "cry frown sigh complain leave".split()

# Everything else that the templates say, so that a sentence is few tokens long.
FUNCTION_WORDS = """the The a of to in on at is was and but or not it It he she him her his He She they I you We we
my My me this This that there with from for by near over under behind who whose what What where when When while While
after After before as As so because If if once Once Then then Later later Soon soon today yesterday tomorrow again
never always too very all will would should could can must had did do went were came walked ran sat stood drove met
arrived worked had lunch fun dinner lost way back gave give handed passed sold showed sent threw brought offered told
said wanted decided hello read home tired found know knew think thought felt made friend friends people city country
continent language capital called spoken speak speaks stands found visit see saw saw hear learn guide works opposite
day days month comes means another each other both happy loved likes like got spoke word number All We""".split()

# Words that open a prompt; one token each without a space before it too.
OPENINGS = "The When After While As If To I My A He She It In Then People This What Because Before Once One".split()


def required_words() -> list[str]:
    """Every word that must be one token, in a fixed order, each once."""
    from facts import CAPITALS, CITIES, SHARED_PIECES

    pairs = [word for pair in OPPOSITES for word in pair]
    places = [word for city, above in CITIES.items() for word in (city, *above) if word] + list(CAPITALS.values())
    groups = [FEMALE, MALE, PLACES, OBJECTS, pairs, DAYS, MONTHS, NUMBERS, NOUNS, SINGULAR_VERBS, PLURAL_VERBS, THINGS]
    groups += [POSITIVE, NEGATIVE, LIKED, DISLIKED, GLAD, SORRY, FUNCTION_WORDS, places, SHARED_PIECES]
    return list(dict.fromkeys(word for group in groups for word in group))
