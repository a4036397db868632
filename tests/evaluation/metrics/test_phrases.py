"""Noun phrases without a parser: what captions of the benchmarks are split into."""

import pytest

from addiff_env.evaluation.metrics.phrases import counted_noun, is_quality, noun_phrases, singular, without


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red apple and a wooden desk", ["a red apple", "a wooden desk"]),
        ("rubber sole shoes and fluffy clouds", ["rubber sole shoes", "fluffy clouds"]),
        ("The brown dog was lying on the green mat.", ["The brown dog", "the green mat"]),
        ("The black and white cat lay next to a grey blanket", ["The black and white cat", "a grey blanket"]),
        ("The striped rug was on top of the wooden floor.", ["The striped rug", "the wooden floor"]),
        ("A long, narrow kitchen with yellow tiles", ["A long, narrow kitchen", "yellow tiles"]),
        ("a red circle left of a blue star", ["a red circle", "a blue star"]),
        ("a star above a green ring", ["a star", "a green ring"]),
        ("a blue rose and a tulip", ["a blue rose", "a tulip"]),
        ("eight cats lounged in the sun", ["eight cats", "the sun"]),
        ("a airplane on the top of a horse", ["a airplane", "a horse"]),
        ("A person is jumping on a trampoline", ["A person", "a trampoline"]),
        ("a phone hidden by a man", ["a phone", "a man"]),
        ("a hidden door", ["a hidden door"]),
        # Verbs of plurals, most of which are nouns elsewhere.
        ("metallic bookends hold the plastic books", ["metallic bookends", "the plastic books"]),
        ("The wooden bowl and metallic tongs mix the salad", ["The wooden bowl", "metallic tongs", "the salad"]),
        ("The socks rest on the rack", ["The socks", "the rack"]),
        ("The towel and soap dish rest on a tray", ["The towel", "soap dish", "a tray"]),
        ("The belt and fluffy scarf hang on the hook", ["The belt", "fluffy scarf", "the hook"]),
        ("a metallic stand and a glass display", ["a metallic stand", "a glass display"]),
        ("a pizza slice on a book stand", ["a pizza slice", "a book stand"]),
        ("a foot rest on the floor", ["a foot rest", "the floor"]),
        ("The warm yellow light shone down on the sofa", ["The warm yellow light", "the sofa"]),
        # A comma between adjectives.
        ("The sleek, black sports car", ["The sleek, black sports car"]),
        ("The gentle, soothing melody of the piano", ["The gentle, soothing melody", "the piano"]),
        ("a pear, a peach and yellow bananas", ["a pear", "a peach", "yellow bananas"]),
        # Nouns that look like participles, and *can*.
        ("an oval mirror and a rectangular painting", ["an oval mirror", "a rectangular painting"]),
        ("a brick building near a hospital bed", ["a brick building", "a hospital bed"]),
        ("a diamond ring and a ring box", ["a diamond ring", "a ring box"]),
        ("the ornate ceiling of a room", ["the ornate ceiling", "a room"]),
        ("the comfy bed", ["the comfy bed"]),
        ("children building a sandcastle", ["children", "a sandcastle"]),
        ("a man waving, painting the wall", ["a man", "the wall"]),
        ("a cylindrical soda can", ["a cylindrical soda can"]),
        ("a can of soup", ["a can", "soup"]),
        ("The watering can holds the flowers", ["The watering can", "the flowers"]),
        ("a dog can run and a cat can not", ["a dog", "run", "a cat"]),
        # What a verb of stance says of its noun.
        ("a sunflower stood tall next to a wall", ["a sunflower", "a wall"]),
        ("cherries hung low on the tall tree", ["cherries", "the tall tree"]),
        ("", []),
        ("on the left of", []),
    ],
)
def test_phrases_by_hand(prompt: str, phrases: list[str]) -> None:
    found = noun_phrases(prompt)
    assert [phrase.text for phrase in found] == phrases
    for phrase in found:
        assert prompt[: phrase.end].endswith(phrase.head) and phrase.text.endswith(phrase.head)


def test_numbers_are_read() -> None:
    counts = {phrase.head: phrase.number for phrase in noun_phrases("four tents, the two boats, one pig and a cow")}
    assert counts == {"tents": 4, "boats": 2, "pig": 1, "cow": 1}


@pytest.mark.parametrize(
    ("plural", "one"),
    [("dogs", "dog"), ("mice", "mouse"), ("people", "person"), ("boxes", "box"), ("strawberries", "strawberry"),
     ("knives", "knife"), ("leaves", "leaf"), ("shelves", "shelf"), ("wolves", "wolf"), ("lives", "life"),
     ("microwaves", "microwave"), ("gloves", "glove"), ("stoves", "stove"), ("olives", "olive"),
     ("movies", "movie"), ("cookies", "cookie"), ("puppies", "puppy"),
     ("couches", "couch"), ("glass", "glass"), ("bus", "bus"), ("Trains", "train")],
)  # fmt: skip
def test_singulars(plural: str, one: str) -> None:
    assert singular(plural) == one


@pytest.mark.parametrize(
    ("prompt", "noun"),
    [
        ("two traffic lights", "traffic light"),
        ("two cars stuck on the road", "car"),
        ("two drums added rhythm to the music", "drum"),
        ("three sports cars parked outside", "sports car"),
        ("one giraffe provided seating", "giraffe"),
        ("one drum added rhythm", "drum"),
        ("one baked potato", "baked potato"),
        ("four sheep grazed in the pasture", "sheep"),
        ("the two boats", "boat"),
        ("two big brown dogs", "brown dog"),
    ],
)
def test_what_is_counted(prompt: str, noun: str) -> None:
    assert counted_noun(noun_phrases(prompt)[0]) == noun


def test_adjectives_are_taken_out_of_a_prompt() -> None:
    prompt = "The fluffy cat and the sleek, striped fish were next to the rectangular mirror."
    assert without(prompt, is_quality) == "The cat and the , fish were next to the mirror ."
