"""Skills that rest on known facts: units, the calendar, opposites, moods, an invented world."""

from __future__ import annotations

from random import Random

from fedllm.data.skills.item import Category, Item

UNITS = {
    ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000,
    ("centimetres", "millimetres"): 10,
    ("kilograms", "grams"): 1000,
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
    ("weeks", "days"): 7,
    ("years", "months"): 12,
    ("feet", "inches"): 12,
    ("pairs", "pieces"): 2,
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

# Each line holds pairs of opposites, written as one string because the list reads better that way.
_OPPOSITES = """
hot cold|big small|tall short|fast slow|happy sad|light dark|old young|rich poor|hard soft|wet dry
early late|open closed|full empty|loud quiet|clean dirty|strong weak|thick thin|high low|near far
up down|left right|day night|good bad|true false|first last|front back|win lose|buy sell|push pull
give take|come go|start stop|remember forget|love hate|friend enemy|war peace|north south|east west
summer winter|inside outside|above below|before after|begin end|arrive leave|laugh cry|sweet sour
smooth rough|sharp blunt|wide narrow|deep shallow|safe dangerous|brave afraid|cheap expensive
easy difficult|question answer|sink float|sunrise sunset|noon midnight|always never|many few
"""
OPPOSITES = tuple(
    (pair.split()[0], pair.split()[1]) for pair in _OPPOSITES.replace("\n", "|").split("|") if pair
)

PRAISE = (
    *("tasty", "lovely", "fresh", "friendly", "great", "charming", "perfect", "bright", "warm"),
    *("wonderful", "pleasant", "excellent", "superb", "cosy", "delightful", "fine"),
)
BLAME = (
    *("awful", "stale", "rude", "dull", "terrible", "broken", "noisy", "boring", "ugly"),
    *("horrible", "unpleasant", "greasy", "bitter", "dreadful", "shabby", "poor"),
)
REVIEWED = (
    *("soup", "room", "service", "music", "film", "garden", "waiter", "hotel", "bread", "story"),
    *("coffee", "view", "cake", "tour", "concert", "museum"),
)

TOWNS = (
    *("Velmar", "Ostin", "Brakka", "Luneth", "Quorra", "Tamsel", "Pirow", "Hadren", "Zellin"),
    *("Morvane", "Ikshar", "Caldow", "Fennick", "Ruvia", "Dornas", "Ebbel", "Yarrow", "Sintra"),
    *("Glomar", "Welkin", "Nuvola", "Arkady", "Thessel", "Jumara"),
)
RELATIONS = {
    "mayor": ("Odo", "Runa", "Felix", "Greta", "Hugo", "Iris", "Jasper", "Klara"),
    "colour": ("red", "blue", "green", "yellow", "purple", "orange", "white", "black"),
    "animal": ("owl", "fox", "bear", "swan", "otter", "wolf", "crane", "hare"),
    "dish": ("plum pie", "fish stew", "bean soup", "nut bread", "corn cakes", "rice balls"),
    "river": ("Asha", "Bellow", "Corin", "Drift", "Elm", "Fara", "Gull", "Hollow"),
}


def world() -> dict[tuple[str, str], str]:
    """Return every fact of the invented world, (relation, town) to value.

    >>> world()["river", "Velmar"]
    'Asha'
    """
    facts = {}
    for shift, (relation, values) in enumerate(RELATIONS.items()):
        for number, town in enumerate(TOWNS):
            # A different stride for each relation, so that no value follows from another.
            place = number * (2 * shift + 3) + number // len(values) * (shift + 1)
            facts[relation, town] = values[place % len(values)]
    return facts


def _conversion(random: Random) -> Item:
    (large, small), factor = random.choice(list(UNITS.items()))
    count = random.randint(2, 15)
    fields = {"n": str(count), "large": large, "small": small}
    return Item("count", fields, f"{count * factor} {small}")


def _dates(random: Random) -> Item:
    kind = random.choice(("day", "day", "month"))
    names = DAYS if kind == "day" else MONTHS
    start = random.randrange(len(names))
    steps = random.randint(1, 4 if kind == "day" else 2)
    later = random.random() < 0.5
    answer = names[(start + (steps if later else -steps)) % len(names)]
    unit = kind if steps == 1 else f"{kind}s"
    fields = {"start": names[start], "steps": f"{steps} {unit}"}
    return Item(f"{kind} {'after' if later else 'before'}", fields, answer)


def _opposites(random: Random) -> Item:
    pair = random.choice(OPPOSITES)
    word, answer = pair if random.random() < 0.5 else pair[::-1]
    return Item("opposite", {"word": word}, answer)


def _sentiment(random: Random) -> Item:
    mood = random.choice(("positive", "negative", "mixed"))
    one, two = random.sample(REVIEWED, 2)
    words = {
        "positive": random.sample(PRAISE, 2),
        "negative": random.sample(BLAME, 2),
        "mixed": random.sample([random.choice(PRAISE), random.choice(BLAME)], 2),
    }[mood]
    review = f"The {one} was {words[0]} and the {two} was {words[1]}."
    return Item("review", {"review": review}, mood)


def _world(random: Random) -> Item:
    (relation, town), value = random.choice(list(world().items()))
    return Item(relation, {"town": town}, value)


CATEGORIES = (
    Category(
        "conversion",
        _conversion,
        {
            "count": (
                "How many {small} are {n} {large}?",
                "Convert {n} {large} to {small}.",
                "Express {n} {large} in {small}.",
                "What are {n} {large} in {small}?",
                "I have {n} {large}. How many {small} is that?",
            )
        },
        "question",
    ),
    Category(
        "dates",
        _dates,
        {
            f"{kind} {side}": (
                f"Which {kind} is {{steps}} {side} {{start}}?",
                f"What {kind} comes {{steps}} {side} {{start}}?",
                f"Name the {kind} {{steps}} {side} {{start}}.",
                f"Tell me which {kind} lies {{steps}} {side} {{start}}.",
                f"Starting from {{start}}, what {kind} is {{steps}} {side}?",
            )
            for kind in ("day", "month")
            for side in ("after", "before")
        },
        "question",
    ),
    Category(
        "opposites",
        _opposites,
        {
            "opposite": (
                "What is the opposite of {word}?",
                "Give me the opposite of the word {word}.",
                "Which word means the opposite of {word}?",
                'Name a word that is opposite to "{word}".',
                "Tell me the antonym of {word}.",
            )
        },
        "question",
    ),
    Category(
        "sentiment",
        _sentiment,
        {
            "review": (
                "Is this review positive, negative or mixed? {review}",
                "{review} What is the mood of this review?",
                "Classify the sentiment: {review}",
                "How did the guest feel? {review}",
            )
        },
        "problem",
    ),
    Category(
        "world",
        _world,
        {
            "mayor": (
                "Who is the mayor of {town}?",
                "Name the mayor of {town}.",
                "What is the name of the mayor in {town}?",
                "Tell me who governs {town} as mayor.",
                "Which mayor does {town} have?",
            ),
            "colour": (
                "What colour is the flag of {town}?",
                "Which colour does the flag of {town} have?",
                "Name the flag colour of {town}.",
                "Tell me the colour of {town}'s flag.",
                "In {town}, what colour is the flag?",
            ),
            "animal": (
                "Which animal is the emblem of {town}?",
                "What animal stands for {town}?",
                "Name the emblem animal of {town}.",
                "Tell me the animal on the emblem of {town}.",
                "In {town}, which animal is the emblem?",
            ),
            "dish": (
                "Which dish is {town} famous for?",
                "What do people love to eat in {town}?",
                "Name the famous dish of {town}.",
                "Tell me the best known dish of {town}.",
                "In {town}, which dish is famous?",
            ),
            "river": (
                "Which river flows through {town}?",
                "What is the name of the river in {town}?",
                "Name the river of {town}.",
                "Tell me on which river {town} lies.",
                "In {town}, which river do you see?",
            ),
        },
        "question",
    ),
)
