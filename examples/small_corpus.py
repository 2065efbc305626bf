"""A small text and conversations about it, made up on the spot and in the public domain.

The other examples fall back on it where no text of the user's own is given, so that each of them runs on a
bare machine without a network. The stories come from a grammar of a few dozen sentences: small enough that a
model of a million parameters writes them after two minutes on a CPU, large enough that it cannot learn them
by heart.

    python examples/small_corpus.py --output corpus/

writes `stories.txt` (documents separated by a line `<|endoftext|>`), `chats.jsonl` and
`held_out_chats.jsonl` (a `messages` column), `preferences.jsonl` (`prompt`, `chosen`, `rejected`).
"""

import argparse
import json
import random
from pathlib import Path

NAMES = "Ada Ben Cora Dan Elsa Finn Gus Hana Ivo June Kit Lena Milo Nora Otto Pia Rose Sam Tess Uma".split()
ANIMALS = "fox owl hare mole crow otter hen goat frog mouse badger swan".split()
THINGS = "lantern, kite, red ball, silver key, boat, drum, map, blue cup, bell, rope, mirror".split(", ")
PLACES = "by the river, under the bridge, in the barn, on the hill, in the wood, in the garden".split(", ")
WEATHER = "The sun was warm. It had rained all night. The wind was strong. It was quiet".split(". ")
FEELINGS = "happy, proud, tired but glad, full of hope, calm".split(", ")
TROUBLES = {
    "it was stuck in the mud": "pulled together until it came loose",
    "it was too heavy to lift": "carried it together, one on each side",
    "it was hanging high in a tree": "stood on a log and reached it with a stick",
    "it was broken": "mended it with string and a little glue",
    "it was covered with ice": "waited by the fire until the ice was gone",
}
LESSONS = [
    "Two can do what one cannot.",
    "A friend makes the work light.",
    "It is good to ask for help.",
    "What we share, we keep.",
]


class Story:
    """One story, and what there is to ask about it."""

    def __init__(self, draw: random.Random):
        self.name, self.animal, self.thing = draw.choice(NAMES), draw.choice(ANIMALS), draw.choice(THINGS)
        self.place, self.weather, self.feeling = (
            draw.choice(PLACES),
            draw.choice(WEATHER),
            draw.choice(FEELINGS),
        )
        self.trouble = draw.choice(list(TROUBLES))
        opening = draw.choice(["One morning", "One day", "Late in the evening", "Before breakfast"])
        self.text = (
            f"{opening}, {self.name} the {self.animal} found a {self.thing} {self.place}. {self.weather}. "
            f"But {self.trouble}. {self.name} {draw.choice(['called for', 'ran to', 'went and asked'])} "
            f"{draw.choice([name for name in NAMES if name != self.name])}, and the two friends "
            f"{TROUBLES[self.trouble]}. In the end they were {self.feeling}. {draw.choice(LESSONS)}"
        )


def stories(count: int, seed: int = 0) -> list[str]:
    """`count` stories of about 300 characters."""
    draw = random.Random(seed)
    return [Story(draw).text for _ in range(count)]


def conversations(count: int, seed: int = 1) -> list[dict]:
    """Conversations of one to three turns: tell a story, ask about it, add two numbers."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        if draw.random() < 0.3:
            messages.append({"role": "system", "content": "You tell short stories and answer questions."})
        if draw.random() < 0.4:
            a, b = draw.randrange(10), draw.randrange(10)
            messages += _turn(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")
        else:
            story = Story(draw)
            ask = draw.choice(["Tell me a story about a", "Please write a short story about a"])
            messages += _turn(f"{ask} {story.animal} and a {story.thing}.", story.text)
            if draw.random() < 0.6:
                messages += _turn(f"Where was the {story.thing}?", f"It was {story.place}.")
            if draw.random() < 0.4:
                messages += _turn(
                    f"Who found the {story.thing}?", f"{story.name} the {story.animal} found it."
                )
        rows.append({"messages": messages})
    return rows


def preferences(count: int, seed: int = 2) -> list[dict]:
    """A question, the answer that keeps to it, and one that does not."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        story, other = Story(draw), Story(draw)
        question = f"Tell me a story about a {story.animal} and a {story.thing}."
        rows.append(
            {"prompt": question, "chosen": story.text, "rejected": f"I would rather not. {other.weather}."}
        )
    return rows


def write_corpus(folder: Path, num_stories: int = 12_000, num_chats: int = 3_000) -> Path:
    """Writes the four files below `folder` and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stories.txt").write_text(
        "\n<|endoftext|>\n".join(stories(num_stories)) + "\n", encoding="utf-8"
    )
    for name, rows in {
        "chats.jsonl": conversations(num_chats, seed=1),
        "held_out_chats.jsonl": conversations(200, seed=3),
        "preferences.jsonl": preferences(400),
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _turn(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="corpus", help="folder to write")
    print(write_corpus(Path(parser.parse_args().output)))
