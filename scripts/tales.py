"""Tales: short synthetic texts that state facts early and ask for them at the end.

A tale states where things are ("Tom's silver coin is in the quiet garden."), mixes in sentences
that state nothing, and ends with questions whose answers repeat a fact word for word. A model that
answers must fetch the fact from its KV cache, so a tale is a needle-in-a-haystack test with a
checkable answer. Everything comes from the word lists below and a seed; no outside text is used.

    python3 scripts/tales.py --count 3 --facts 4 --fillers 8 --seed 1

prints one JSON object a line: {"prompt": ..., "answer": ...}.
"""

import argparse
import json
import random

NAMES = "Mia Tom Ana Leo Eva Sam Nora Max Ida Ben Lily Paul Rosa Finn Clara Hugo Ella Oscar Ruth Theo".split()
THINGS = "key coin ring map letter shell button lamp flute stone feather book candle spoon rope bell".split()
MATERIALS = "brass silver wooden glass paper red blue green old tiny golden heavy".split()
PLACES = "box drawer basket tower boat garden cellar barn cave kitchen well attic chapel mill stable".split()
PLACE_ADJECTIVES = "round dark warm narrow quiet tall hidden sunny dusty cold".split()
FOODS = "bread soup apples cake rice plums cheese pears".split()
WEATHERS = "cold soft strong mild loud gentle".split()
ANIMAL_ADJECTIVES = "small grey white happy tired proud".split()
VERBS = ["is", "was left", "lies hidden"]

FACT = "{name}'s {material} {thing} {verb} in the {adjective} {place}."
QUESTION = "Where is {name}'s {thing}?"
FILLERS = [
    "The wind was {weather} that day.",
    "{An} {animal} bird sang near the {place}.",
    "They ate {food} and talked about the {place}.",
    "It was {weather} outside, so {name} stayed near the {place}.",
    "{name} counted to {number} and laughed.",
    "Later, {name} saw {an} {animal} cat by the {place}.",
    "The bell rang {number} times.",
    "{name} and {other} walked to the {place} and back.",
    "Nobody knew why the {animal} dog slept by the {place}.",
]
WORDS = NAMES + THINGS + MATERIALS + PLACES + PLACE_ADJECTIVES + FOODS + WEATHERS + ANIMAL_ADJECTIVES

LONG = {"facts": [1, 2, 3, 4, 6, 8, 12], "fillers": [0, 1, 2, 4, 8, 16, 32, 64, 96], "echo": [6, 12, 24, 48, 96, 200]}
SHORT = {"facts": [1, 2, 3, 4, 6, 8], "fillers": [0, 1, 2, 4, 8, 12], "echo": [6, 9, 12, 16, 23]}


def filler(rng):
    """A sentence that states no fact."""
    animal = rng.choice(ANIMAL_ADJECTIVES)
    article = "an" if animal[0] in "aeiou" else "a"
    name, other = rng.sample(NAMES, 2)
    return rng.choice(FILLERS).format(
        weather=rng.choice(WEATHERS),
        animal=animal,
        an=article,
        An=article.capitalize(),
        place=rng.choice(PLACES),
        food=rng.choice(FOODS),
        name=name,
        other=other,
        number=rng.randrange(2, 20),
    )


def tale(rng, facts, fillers):
    """A text with `facts` facts and `fillers` fillers, and its (question, answer) pairs, shuffled.

    Things are distinct within a tale, so that every question has one answer.
    """
    known = [
        {
            "name": rng.choice(NAMES),
            "material": rng.choice(MATERIALS),
            "thing": thing,
            "verb": rng.choice(VERBS),
            "adjective": rng.choice(PLACE_ADJECTIVES),
            "place": rng.choice(PLACES),
        }
        for thing in rng.sample(THINGS, facts)
    ]
    sentences = [FACT.format(**fact) for fact in known]
    for _ in range(fillers):
        sentences.insert(rng.randrange(len(sentences) + 1), filler(rng))
    rng.shuffle(known)
    return " ".join(sentences), [(QUESTION.format(**fact), FACT.format(**fact)) for fact in known]


def training_text(rng, shape):
    """One training document: a tale with all its questions, or (one in four) an echo.

    An echo is random words said twice. It teaches copying long before tales alone would. Returned
    as (text, must_be_recalled) segments: what a reader of the text before it can know for certain.
    """
    if rng.random() < 0.25:
        words = " ".join(rng.choices(WORDS, k=rng.choice(shape["echo"])))
        return [(f"{words}. Again:", False), (f" {words}.", True), ("\n", False)]
    text, pairs = tale(rng, rng.choice(shape["facts"]), rng.choice(shape["fillers"]))
    segments = [(text, False)]
    for question, answer in pairs:
        segments += [(f" {question}", False), (f" {answer}", True)]
    return segments + [("\n", False)]


def recall_case(rng, facts, fillers):
    """(prompt, answer): a tale that ends in one question."""
    text, pairs = tale(rng, facts, fillers)
    question, answer = pairs[0]
    return f"{text} {question}", answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--facts", type=int, default=4, choices=range(1, len(THINGS) + 1), metavar="1..16")
    parser.add_argument("--fillers", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        prompt, answer = recall_case(rng, args.facts, args.fillers)
        print(json.dumps({"prompt": prompt, "answer": answer}))


if __name__ == "__main__":
    main()
