"""Skills that must be worked out anew for each problem: sums, sequences, lists, orders."""

from __future__ import annotations

from random import Random

from fedllm.data.skills.item import Category, Item

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Finn", "Gina", "Hans"),
    *("Ida", "Jonas", "Kira", "Leo", "Mia", "Nils", "Olga", "Paul"),
)
THINGS = (
    *("apples", "books", "coins", "stamps", "pens", "shells", "marbles", "cards"),
    *("eggs", "roses", "stickers", "buttons"),
)
WORDS = (
    *("cat", "lamp", "tree", "stone", "cup", "bird", "road", "hat", "fish", "door", "moon", "leaf"),
    *("boat", "key", "rain", "clock", "sand", "bell", "horse", "cloud", "spoon", "wall", "star"),
    *("milk", "chair", "snow", "shoe", "frog", "drum", "kite", "nest", "rope"),
)
ORDINALS = ("first", "second", "third", "last")


def _arithmetic(random: Random) -> Item:
    kind = random.choice(("gain", "loss", "groups"))
    if kind == "gain":
        one, two = random.randint(2, 15), random.randint(2, 9)
        sign, total = "+", one + two
    elif kind == "loss":
        one = random.randint(6, 20)
        two = random.randint(2, min(9, one - 2))
        sign, total = "-", one - two
    else:
        one, two = random.randint(2, 6), random.randint(2, 6)
        sign, total = "x", one * two
    name, thing = random.choice(NAMES), random.choice(THINGS)
    fields = {"name": name, "things": thing, "a": str(one), "b": str(two)}
    return Item(kind, fields, f"{one} {sign} {two} = {total}\n#### {total}")


def _picking(random: Random) -> Item:
    words = random.sample(WORDS, 4)
    place = random.randrange(4)
    return Item("word", {"words": " ".join(words), "place": ORDINALS[place]}, words[place])


def _reversal(random: Random) -> Item:
    words = random.sample(WORDS, random.choice((3, 4)))
    return Item("words", {"words": " ".join(words)}, " ".join(reversed(words)))


def _sequence(random: Random) -> Item:
    step = random.choice((1, 2, 3, 4, 5, 10))
    kind = random.choice(("up", "down"))
    low = random.randint(1, 20)
    terms = [low + step * place for place in range(5)]
    if kind == "down":
        terms.reverse()
    shown = ", ".join(str(term) for term in terms[:4])
    return Item("next", {"shown": shown}, str(terms[4]))


def _sorting(random: Random) -> Item:
    kind = random.choice(("up", "down"))
    numbers = random.sample(range(1, 10), 4)
    ordered = sorted(numbers, reverse=kind == "down")
    return Item(kind, {"list": " ".join(map(str, numbers))}, " ".join(map(str, ordered)))


CATEGORIES = (
    Category(
        "arithmetic",
        _arithmetic,
        {
            "gain": (
                "{name} has {a} {things} and gets {b} more. How many {things} does {name} have?",
                "{name} found {a} {things} and then {b} more. How many {things} are there?",
                "There are {a} {things}. {name} adds {b}. How many {things} are there now?",
            ),
            "loss": (
                "{name} has {a} {things} and gives away {b}. How many {things} are left?",
                "{name} had {a} {things} but lost {b}. How many {things} remain?",
                "There are {a} {things}. {name} takes {b}. How many {things} stay?",
            ),
            "groups": (
                "{name} has {a} boxes with {b} {things} each. How many {things} are there?",
                "{name} fills {a} bags. Each bag holds {b} {things}. How many {things} in all?",
                "There are {a} rows of {b} {things}. How many {things} does {name} count?",
            ),
        },
        "problem",
    ),
    Category(
        "picking",
        _picking,
        {
            "word": (
                "What is the {place} word in this list: {words}?",
                "Pick the {place} word: {words}",
                "Which word stands {place} in {words}?",
                "From the list {words}, choose the {place} word.",
            )
        },
        "problem",
    ),
    Category(
        "reversal",
        _reversal,
        {
            "words": (
                "Reverse the order of these words: {words}",
                "Say these words backwards: {words}",
                "Write the words from last to first: {words}",
                "Turn this list of words around: {words}",
            )
        },
        "problem",
    ),
    Category(
        "sequence",
        _sequence,
        {
            "next": (
                "What number comes next: {shown}?",
                "Continue the sequence {shown} with one number.",
                "Which number follows {shown}?",
                "Find the next number: {shown}",
            )
        },
        "question",
    ),
    Category(
        "sorting",
        _sorting,
        {
            "up": (
                "Sort these numbers from small to large: {list}",
                "Put {list} in ascending order.",
                "Order the numbers {list}, smallest first.",
            ),
            "down": (
                "Sort these numbers from large to small: {list}",
                "Put {list} in descending order.",
                "Order the numbers {list}, largest first.",
            ),
        },
        "problem",
    ),
)
