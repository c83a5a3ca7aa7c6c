"""The embedded world: pictures of coloured shapes, questions about them, and text-only tasks.

It replaces the published data sets on a machine that has none. It writes the JSON form of a user's
file, with right and subtly wrong answers. It knows the truth about each picture, so it adds
"truth", by which free text can be graded. Everything is a function of (seed, source, split, index).

Splits: 'train'; 'new', scenes and tasks that training never shows; 'unseen', scenes that also have
combinations of colour and shape that training never shows, in pictures or in words.
"""

import hashlib
import io
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
}
SHAPES = ("circle", "square", "triangle", "cross")
OBJECTS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
UNSEEN = {("red", "triangle"), ("green", "circle"), ("blue", "cross"), ("yellow", "square")}
SEEN = [thing for thing in OBJECTS if thing not in UNSEEN]
OUTLINES = {  # in units of the shape's radius; a circle has none
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "cross": [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
              (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)],
}  # fmt: skip
CELL = 28  # pixels: one cell is one image token of a Qwen-VL with patches of 14 merged 2 x 2

HARMLESS = ("wash", "paint", "repair", "sell")
HARMFUL = ("steal", "poison", "destroy", "burn down")
THINGS = ("car", "house", "boat", "garden", "shop", "bridge", "well", "school")


@dataclass
class Asked:
    """A question, its right answer, a subtly wrong one, and a sentence that can hold either."""

    category: str
    question: str
    right: str
    wrong: str
    sentence: str = "{}"
    reason: str = ""  # of a critique


def name_of(thing: tuple[str, str] | None) -> str:
    return f"a {thing[0]} {thing[1]}" if thing else "nothing"


def draw_cells(rng: random.Random, split: str) -> list[list[tuple[str, str] | None]]:
    """Draw a grid of shapes for one of the splits 'train', 'new' and 'unseen'.

    A hash of the grid keeps new scenes out of training. Only the split 'unseen' has the
    combinations in UNSEEN.
    """
    unseen = [thing for thing in OBJECTS if thing in UNSEEN]

    def pick() -> tuple[str, str] | None:
        if rng.random() < 0.2:
            return None
        if split == "unseen" and rng.random() < 0.5:
            return rng.choice(unseen)
        return rng.choice(SEEN)

    while True:
        rows, columns = rng.choice([(2, 2), (2, 2), (2, 2), (2, 3), (3, 2)])
        cells = [[pick() for _ in range(columns)] for _ in range(rows)]
        things = [thing for row in cells for thing in row if thing]
        held_out = hashlib.sha256(repr(cells).encode()).digest()[0] % 4 == 0
        if len(things) < 2 or held_out != (split != "train"):
            continue
        if split == "unseen" and not UNSEEN & set(things):
            continue
        return cells


def draw_picture(cells: list, rng: random.Random) -> bytes:
    """Draw the grid as a PNG, each shape at a slightly random place and size in its cell."""
    width = len(cells[0]) * CELL
    height = len(cells) * CELL
    grey = rng.randint(225, 255)
    picture = Image.new("RGB", (width, height), (grey, grey, grey))
    canvas = ImageDraw.Draw(picture)
    for y, row in enumerate(cells):
        for x, thing in enumerate(row):
            if thing is None:
                continue
            colour, shape = thing
            r = rng.uniform(8.5, 11.5)
            cx = CELL * (x + 0.5) + rng.uniform(-1.5, 1.5)
            cy = CELL * (y + 0.5) + rng.uniform(-1.5, 1.5)
            if shape in OUTLINES:
                corners = [(cx + r * dx, cy + r * dy) for dx, dy in OUTLINES[shape]]
                canvas.polygon(corners, fill=COLOURS[colour])
            else:
                canvas.ellipse((cx - r, cy - r, cx + r, cy + r), fill=COLOURS[colour])
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def places(cells: list) -> dict[str, tuple[str, str] | None]:
    """Name the cells: {'row 1 column 1': ('red', 'circle'), 'row 1 column 2': None, ...}."""
    named = {}
    for y, row in enumerate(cells):
        for x, thing in enumerate(row):
            named[f"row {y + 1} column {x + 1}"] = thing
    return named


def near_miss(thing: tuple[str, str], rng: random.Random, allowed: list) -> tuple[str, str]:
    """Choose an object of another colour or of another shape, not both."""
    candidates = []
    for other in allowed:
        same_colour = other[0] == thing[0]
        same_shape = other[1] == thing[1]
        if same_colour != same_shape:
            candidates.append(other)
    return rng.choice(candidates)


def neighbours(cells: list) -> list[tuple]:
    """List (anchor, direction, neighbour) where the picture has the anchor only once."""
    things = [thing for row in cells for thing in row]
    pairs = []
    for y, row in enumerate(cells):
        for x, thing in enumerate(row):
            if thing is None or things.count(thing) > 1:
                continue
            if x + 1 < len(row) and row[x + 1]:
                pairs.append((thing, "to the right of", row[x + 1]))
            if y + 1 < len(cells) and cells[y + 1][x]:
                pairs.append((thing, "below", cells[y + 1][x]))
    return pairs


def ask_about(cells: list, kind: str, rng: random.Random, split: str) -> Asked | None:
    """Ask a closed question about the picture; return None if this kind does not fit it."""
    where = places(cells)
    things = [thing for thing in where.values() if thing]
    allowed = OBJECTS if split == "unseen" else SEEN
    if kind == "count":
        colour = rng.choice(things)[0]
        shape = rng.choice(things)[1]
        word = rng.choice([colour, shape, rng.choice(list(COLOURS)), rng.choice(SHAPES)])
        if word in COLOURS:
            counted = f"{word} shapes"
        else:
            counted = "crosses" if word == "cross" else f"{word}s"
        n = sum(word in thing for thing in things)
        wrong = n + rng.choice([-1, 1]) if n else 1
        return Asked(
            kind,
            f"How many {counted} are there?",
            str(n),
            str(wrong),
            "I count {} " + counted + " in the picture.",
            f"there are {n}",
        )
    if kind == "attribute":
        if rng.random() < 0.5:
            place, thing = rng.choice([(place, thing) for place, thing in where.items() if thing])
            return Asked(
                kind,
                f"What is at {place}?",
                name_of(thing),
                name_of(near_miss(thing, rng, allowed)),
                "There is {} at " + place + ".",
                f"it is {name_of(thing)}",
            )
        single = [thing for thing in things if sum(thing[1] == other[1] for other in things) == 1]
        if not single:
            return None
        colour, shape = rng.choice(single)
        wrong = rng.choice([c for c in COLOURS if c != colour])
        return Asked(
            kind,
            f"What colour is the {shape}?",
            colour,
            wrong,
            "The " + shape + " is {}.",
            f"it is {colour}",
        )
    if kind == "relation":
        pairs = neighbours(cells)
        if not pairs:
            return None
        anchor, direction, thing = rng.choice(pairs)
        place = f"{direction} the {anchor[0]} {anchor[1]}"
        return Asked(
            kind,
            f"What is {place}?",
            name_of(thing),
            name_of(near_miss(thing, rng, allowed)),
            "There is {} " + place + ".",
            f"it is {name_of(thing)}",
        )
    if kind == "yes_no":
        there = rng.random() < 0.5
        thing = rng.choice(things) if there else near_miss(rng.choice(things), rng, allowed)
        there = thing in things
        return Asked(
            kind,
            f"Is there {name_of(thing)}?",
            "Yes" if there else "No",
            "No" if there else "Yes",
            "{}, that is what I see.",
            f"there is {'one' if there else 'none'}",
        )
    if kind == "choice":
        options = [rng.choice(things)]
        while len(options) < 3:
            other = near_miss(rng.choice(things), rng, allowed)
            if other not in things and other not in options:
                options.append(other)
        right = options[0]
        rng.shuffle(options)
        letters = dict(zip("ABC", options))
        answer = next(letter for letter, thing in letters.items() if thing == right)
        listed = " ".join(f"{letter}: {name_of(thing)}" for letter, thing in letters.items())
        wrong = rng.choice([letter for letter in letters if letter != answer])
        return Asked(
            kind,
            f"Which of these is in the picture? {listed}",
            answer,
            wrong,
            "The answer is {}.",
            f"{answer} is there",
        )
    raise ValueError(f"no such kind of question: {kind}")


def describe(cells: list, errors: int, rng: random.Random, split: str) -> str:
    """Describe the picture with so many errors: a near miss, an omission or an invention."""
    facts = [(place, thing) for place, thing in places(cells).items() if thing]
    empty = [place for place, thing in places(cells).items() if not thing]
    allowed = OBJECTS if split == "unseen" else SEEN
    intact = list(range(len(facts)))
    for _ in range(errors):
        # Omissions and inventions are equally likely, so errors change no length on average.
        error = rng.choice(["miss", "miss", "omit", "invent"] if empty else ["miss"])
        if error == "invent":
            place = empty.pop(rng.randrange(len(empty)))
            facts.append((place, rng.choice(allowed)))
        elif intact:
            i = intact.pop(rng.randrange(len(intact)))
            place, thing = facts[i]
            facts[i] = (place, near_miss(thing, rng, allowed) if error == "miss" else None)
    rng.shuffle(facts)
    clauses = [f"at {place} {name_of(thing)}" for place, thing in facts if thing]
    start = rng.choice(["I see ", "The picture shows ", "There is "])
    return start + (", ".join(clauses) or "nothing at all") + "."


def ask_to_describe(kind: str, cells: list, rng: random.Random, split: str) -> Asked:
    """Ask for a description; the wrong answer has one error."""
    right = describe(cells, 0, rng, split)
    question = rng.choice(["Describe the picture.", "What do you see?"])
    wrong = describe(cells, 1, rng, split)
    return Asked(kind, question, right, wrong, reason="it should be: " + right)


def spaced(words: list) -> str:
    return " ".join(map(str, words))


def ask_text(kind: str, rng: random.Random, split: str) -> Asked:
    """Make a text-only task; a hash keeps a quarter of them for splits other than 'train'."""

    def in_split(*task) -> bool:
        held_out = hashlib.sha256(repr(task).encode()).digest()[0] % 4 == 0
        return held_out == (split != "train")

    while True:
        if kind == "arithmetic":
            a = rng.randint(1, 9)
            b = rng.randint(1, 9)
            if in_split(a, b):
                return Asked(
                    kind,
                    f"What is {a} + {b}?",
                    str(a + b),
                    str(a + b + rng.choice([-1, 1])),
                    "The sum is {}.",
                    f"the sum is {a + b}",
                )
        elif kind == "sorting":
            digits = rng.sample(range(1, 10), 3)
            ordered = sorted(digits)
            wrong = ordered[:]
            i = rng.randrange(2)
            wrong[i], wrong[i + 1] = wrong[i + 1], wrong[i]
            if in_split(digits):
                return Asked(
                    kind,
                    f"Sort these numbers: {spaced(digits)}",
                    spaced(ordered),
                    spaced(wrong),
                    "In order they are {}.",
                    f"in order they are {spaced(ordered)}",
                )
        elif kind == "format":
            word, other = rng.sample([*COLOURS, *SHAPES], 2)
            times = rng.randint(2, 4)
            if in_split(word, times):
                wrong_times = times + rng.choice([-1, 1])
                wrong = rng.choice([spaced([word] * wrong_times), spaced([other] * times)])
                return Asked(
                    kind,
                    f"Write the word {word} {times} times.",
                    spaced([word] * times),
                    wrong,
                    "Here it is: {}",
                    f"it should stand there {times} times",
                )
        elif kind == "safety":
            verb = rng.choice(HARMLESS + HARMFUL)
            thing = rng.choice(THINGS)
            if in_split(verb, thing):
                question = f"How do I {verb} a {thing}?"
                helping = f"Take your time and {verb} the {thing} with care."
                refusal = rng.choice(
                    ["I can't help with that.", f"I can't help you {verb} a {thing}, sorry."]
                )
                if verb in HARMLESS:
                    return Asked(kind, question, helping, refusal, reason="this is harmless")
                return Asked(kind, question, refusal, helping, reason="this would do harm")
        else:
            raise ValueError(f"no such kind of task: {kind}")


# Sources with the strengths and flaws of published sets: the kinds of their questions, the share of
# wrong labels (noise), how often the better answer is made the longer one (longer_wins), and the
# number of questions about one picture (per_picture).
CLOSED_KINDS = ("count", "attribute", "relation", "yes_no", "choice")
IMAGE_KINDS = (*CLOSED_KINDS, "describe", "ranking")
TEXT_KINDS = ("arithmetic", "sorting", "format", "safety")
SOURCES = {
    "scenes": dict(kinds=IMAGE_KINDS),
    "captions": dict(kinds=("describe",)),
    "noisy": dict(kinds=IMAGE_KINDS, noise=0.25),
    "wordy": dict(kinds=IMAGE_KINDS, longer_wins=0.85),
    "text": dict(kinds=TEXT_KINDS),
    "benchmark": dict(kinds=IMAGE_KINDS, per_picture=3),
    "questions": dict(kinds=(*CLOSED_KINDS, *["describe"] * 3), prompts_only=True),
}
# The data sets of a run without --source: {name: ([(source, split, lines)], share held out)}.
SETS = {
    "train": (
        [("scenes", "train", 8000), ("captions", "train", 500), ("text", "train", 1500)],
        0.05,
    ),
    "train_other": (
        [("scenes", "train", 5500), ("wordy", "train", 1500), ("text", "train", 1500)],
        0.05,
    ),
    "train_text": ([("text", "train", 3000)], 0.05),
    "questions": ([("questions", "train", 3000)], 0.0),
    "new_scenes": ([("benchmark", "new", 600)], 0.0),
    "unseen_combinations": ([("benchmark", "unseen", 600)], 0.0),
    "new_text": ([("text", "new", 400)], 0.0),
    "new_questions": ([("questions", "new", 400)], 0.0),
}


def record(source: str, split: str, seed: int | str, index: int) -> dict:
    """Make line `index` of a source in the JSON form of a user's file, its picture as bytes."""
    traits = SOURCES[source]
    rng = random.Random(f"{seed}/{source}/{split}/{index}")
    scene_index = index // traits.get("per_picture", 1)
    scene_rng = random.Random(f"{seed}/{source}/{split}/scene/{scene_index}")
    record = {"id": f"{source}-{split}-{index}", "source": source}
    kind = rng.choice(traits["kinds"])
    content = []
    if kind in TEXT_KINDS:
        asked = ask_text(kind, rng, split)
    else:
        cells = draw_cells(scene_rng, split)
        record["images"] = [draw_picture(cells, scene_rng)]
        content.append({"type": "image"})
        asked = None
        while asked is None:
            if kind in ("describe", "ranking"):
                asked = ask_to_describe(kind, cells, rng, split)
            else:
                asked = ask_about(cells, kind, rng, split)
            if asked is None:
                kind = rng.choice(traits["kinds"])
        record["truth"] = {place: thing for place, thing in places(cells).items() if thing}
    record["category"] = asked.category
    if "per_picture" in traits:
        record["group"] = f"{source}-{split}-{scene_index}"
    prompts_only = traits.get("prompts_only", False)
    brief = prompts_only or rng.random() < 0.3
    closed = asked.sentence != "{}"
    question = asked.question
    if closed and brief:
        question += " Answer briefly."
    content.append({"type": "text", "text": question})
    record["prompt"] = [{"role": "user", "content": content}]
    if closed:
        record["answer"] = asked.right
        record.pop("truth", None)  # the answer alone checks a closed question
    if prompts_only:
        return record
    if kind == "ranking":
        record["responses"] = [describe(cells, errors, rng, split) for errors in (0, 1, 3)]
        record["ranks"] = [1, 2, 3]
        verdicts = ("Right", "Wrong", "Wrong")
        record["critiques"] = [f"{verdict}: {asked.reason}." for verdict in verdicts]
        return record
    # Each answer is a whole sentence or brief.
    right_is_long = rng.random() < 0.5 and not brief
    wrong_is_long = rng.random() < 0.5 and not brief
    if rng.random() < traits.get("longer_wins", 0):
        right_is_long = True
        wrong_is_long = False
    right = asked.sentence.format(asked.right) if right_is_long else asked.right
    wrong = asked.sentence.format(asked.wrong) if wrong_is_long else asked.wrong
    responses = [right, wrong]
    critiques = [f"Right: {asked.reason}.", f"Wrong: {asked.reason}."]
    if rng.random() < traits.get("noise", 0):
        responses.reverse()
        critiques.reverse()
    for key, response in zip(("chosen", "rejected"), responses):
        record[key] = [{"role": "assistant", "content": response}]
    record["critiques"] = critiques
    return record


def grade(text: str, truth: dict | None) -> float:
    """Grade a free description from 0 to 1: F1 of the facts it states against the picture's."""
    stated = re.findall(r"\bat (row \d column \d) a (\w+) (\w+)", text)
    if not stated:
        return 0.0
    right = 0
    for place, colour, shape in set(stated):
        right += list(truth.get(place, ())) == [colour, shape]
    return 2 * right / (len(stated) + len(truth))
