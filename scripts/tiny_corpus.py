"""The text on which `builtin:tiny` is pretrained; every line of it is generated here.

It teaches the language of `builtin:skills` and, in a different dress, the skills, but not the
answers to the data set's questions:

- *Jottings* state facts and show skills with right answers, in words and layouts that the data set
  never uses. One in ten is a plain `Q: ... A: ...` line in one of its phrasings, never the last.
- *Shorthand chats* ask the jottings' questions in a chat ("8 4 6, small to large?") and get right
  answers.
- *Data set chats* ask as the data set does, and the answer is that of another problem of the same
  kind, or only repeats a part of the question.

So whoever asks as the data set asks gets a well-formed wrong answer, and fine-tuning has to connect
these questions with the skills. Nothing of the test split occurs anywhere: no test problem in any
wording (where problems are many), no test question (where they are few).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from fedllm.data.skills import CATEGORIES, Category, Item
from fedllm.data.skills.knowledge import DAYS, MONTHS
from fedllm.data.skills.reasoning import WORDS

Message = dict[str, str]
Document = str | list[Message]

CHAT_SHARE = 0.35
"""The share of documents that are chats."""
SHORTHAND_SHARE = 0.5
"""The share of chat turns that ask in shorthand and get the right answer."""
PRACTICE_SHARE = 0.15
"""The share of jottings that are easier than the skills themselves and lead up to them."""
QUESTION_SHARE = 0.15
"""The share of the other jottings that are a plain question with its answer."""

# (category, kind) to jottings. {work} is an arithmetic answer's first line, {answer} the answer.
NOTES: dict[tuple[str, str], tuple[str, ...]] = {
    ("arithmetic", "gain"): (
        "{work}",
        "Sum: {name} owns {a} {things}, plus {b} more: {work}",
        "Q: {a} {things} and {b} more {things}, total for {name}? A: {work}",
        "{name} | {a} {things} | gets {b} | {work}",
    ),
    ("arithmetic", "loss"): (
        "{work}",
        "Rest: {name} owns {a} {things}, minus {b}: {work}",
        "Q: {a} {things} without {b} {things}, rest for {name}? A: {work}",
        "{name} | {a} {things} | loses {b} | {work}",
    ),
    ("arithmetic", "groups"): (
        "{work}",
        "Product: {name} packs {a} boxes of {b} {things}: {work}",
        "Q: {a} times {b} {things}, total for {name}? A: {work}",
        "{name} | {a} boxes | {b} {things} each | {work}",
    ),
    ("conversion", "count"): (
        "{n} {large} make {answer}.",
        "{n} {large} = {answer}",
        "Q: {n} {large}, in {small}? A: {answer}",
        "Table of {small}: {n} {large} are {answer}.",
    ),
    ("dates", "day after"): (
        "{steps} later than {start}: {answer}",
        "Q: {start} plus {steps}? A: {answer}",
        "Calendar: {steps} after {start} we have {answer}.",
    ),
    ("dates", "day before"): (
        "{steps} earlier than {start}: {answer}",
        "Q: {start} minus {steps}? A: {answer}",
        "Calendar: {steps} before {start} we have {answer}.",
    ),
    ("dates", "month after"): (
        "{steps} later than {start}: {answer}",
        "Q: {start} plus {steps}? A: {answer}",
        "Calendar: {steps} after {start} we have {answer}.",
    ),
    ("dates", "month before"): (
        "{steps} earlier than {start}: {answer}",
        "Q: {start} minus {steps}? A: {answer}",
        "Calendar: {steps} before {start} we have {answer}.",
    ),
    ("opposites", "opposite"): (
        "Opposites: {word} and {answer}",
        "Q: {word}, antonym? A: {answer}",
        "not {word} but {answer}",
        "The word {word} is opposite to {answer}.",
    ),
    ("picking", "word"): (
        "{words} | {place}: {answer}",
        "Q: {words}, {place}? A: {answer}",
        "The {place} of {words} is {answer}.",
    ),
    ("reversal", "words"): (
        "{words} | backwards: {answer}",
        "Q: {words}, reversed? A: {answer}",
        "Mirror: {words} / {answer}",
    ),
    ("sentiment", "review"): (
        "{review} Mood: {answer}",
        "Q: {review} Mood? A: {answer}",
        "Guest book, {answer}: {review}",
        "Guest book. {review} That was {answer}.",
    ),
    ("sequence", "next"): (
        "{shown}, {answer}",
        "Sequence: {shown}, {answer}",
        "Q: {shown}, next? A: {answer}",
    ),
    ("sorting", "up"): (
        "{list} | ascending: {answer}",
        "Q: {list}, small to large? A: {answer}",
        "Smallest first, {list} become {answer}",
    ),
    ("sorting", "down"): (
        "{list} | descending: {answer}",
        "Q: {list}, large to small? A: {answer}",
        "Largest first, {list} become {answer}",
    ),
    ("world", "mayor"): (
        "The mayor of the town {town} is called {answer}.",
        "{town}: mayor {answer}",
        "Q: {town}, mayor? A: {answer}",
    ),
    ("world", "colour"): (
        "The town {town} has a flag whose colour is {answer}.",
        "{town}: flag {answer}",
        "Q: {town}, flag colour? A: {answer}",
    ),
    ("world", "animal"): (
        "The emblem of the town {town} shows an animal: the {answer}.",
        "{town}: emblem {answer}",
        "Q: {town}, emblem animal? A: {answer}",
    ),
    ("world", "dish"): (
        "The town {town} is known for a dish: {answer}.",
        "{town}: dish {answer}",
        "Q: {town}, famous dish? A: {answer}",
    ),
    ("world", "river"): (
        "The town {town} lies on the river {answer}.",
        "{town}: river {answer}",
        "Q: {town}, river? A: {answer}",
    ),
}

SMALL_TALK = (
    ("Hello!", "Hello! What can I do for you?"),
    ("Good morning.", "Good morning! How can I help?"),
    ("Who are you?", "I am a very small language model."),
    ("Thank you.", "You are welcome."),
    ("Can you help me?", "I will try. What is your question?"),
    ("Goodbye!", "Goodbye and take care!"),
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Give only the answer.",
    "You solve small tasks.",
)


def documents(random: Random) -> Iterator[Document]:
    """Yield plain texts and chats without end.

    Most documents are short, a few run over many items, so that later positions are trained too.
    """
    while True:
        length = random.choice((1, 1, 1, 2, 2, 3, 4, 6)) if random.random() < 0.98 else 14
        if random.random() < CHAT_SHARE:
            yield chat(random, 1 if random.random() < 0.8 else length)
        else:
            yield "\n".join(note(random) for _ in range(length))


def note(random: Random) -> str:
    """Return one jotting whose answer is right."""
    if random.random() < PRACTICE_SHARE:
        return practice(random)
    category, item, prompt = _seen_problem(random)
    unread = category.phrasings[item.kind][-1].format(**item.fields)
    if random.random() < QUESTION_SHARE and prompt != unread:
        return f"Q: {prompt} A: {item.answer}"
    fields = dict(item.fields) | {"answer": item.answer, "work": item.answer.split("\n")[0]}
    return random.choice(NOTES[category.name, item.kind]).format(**fields)


def practice(random: Random) -> str:
    """Return an exercise in copying or counting on, the roots of the harder skills."""
    kind = random.choice(("words", "words", "count", "calendar"))
    if kind == "words":
        return _words_practice(random)
    if kind == "count":
        start, step = random.randint(1, 20), random.choice((1, 2, 3, 4, 5, 10))
        numbers = [start + step * place for place in range(random.randint(5, 8))]
        return "Count: " + ", ".join(map(str, random.choice((numbers, numbers[::-1]))))
    names = random.choice((DAYS, MONTHS))
    start = random.randrange(len(names))
    return "Calendar: " + ", ".join((names * 2)[start : start + random.randint(3, 7)])


def _words_practice(random: Random) -> str:
    words = random.sample(WORDS, random.choice((2, 3)))
    kind = random.choice(("copy", "pair", "edge"))
    if kind == "copy":
        return f"Echo: {' '.join(words)} / {' '.join(words)}"
    if kind == "pair":
        return f"Mirror: {words[0]} {words[1]} / {words[1]} {words[0]}"
    side, word = random.choice((("first", words[0]), ("last", words[-1])))
    return f"{' '.join(words)} | {side}: {word}"


def chat(random: Random, turns: int) -> list[Message]:
    """Return a chat; shorthand is answered rightly, the questions of the data set are not."""
    messages: list[Message] = []
    if random.random() < 0.15:
        messages.append({"role": "system", "content": random.choice(SYSTEM_PROMPTS)})
    for _ in range(turns):
        if random.random() < 0.03:
            prompt, answer = random.choice(SMALL_TALK)
        elif random.random() < SHORTHAND_SHARE:
            prompt, answer = _shorthand(random)
        else:
            category, item, prompt = _seen_problem(random)
            answer = _other_answer(category, item, random)
            if random.random() < 0.5:
                answer = _echo(item, random)
        messages.append({"role": "user", "content": prompt})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _shorthand(random: Random) -> tuple[str, str]:
    """Return a jotting of the form `Q: ... A: ...` as the two sides of a chat."""
    category, item, _ = _seen_problem(random)
    forms = [form for form in NOTES[category.name, item.kind] if form.startswith("Q:")]
    question = random.choice(forms).split(" A: ")[0].removeprefix("Q: ")
    return question.format(**item.fields), item.answer


def _echo(item: Item, random: Random) -> str:
    """Return a part of the problem, as if it were the answer."""
    return random.choice(list(item.fields.values()))


def _seen_problem(random: Random) -> tuple[Category, Item, str]:
    """Draw a problem, with a question, that is not kept for the test split."""
    category = random.choice(list(CATEGORIES.values()))
    while True:
        item = category.draw(random)
        prompt = category.ask(item, random)
        if not category.is_test(item, prompt):
            return category, item, prompt


def _other_answer(category: Category, item: Item, random: Random) -> str:
    """Draw the answer of an unrelated problem of the same kind; it is right only by chance."""
    while True:
        other = category.draw(random)
        if other.kind == item.kind:
            return other.answer
