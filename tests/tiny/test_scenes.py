import hashlib
from collections import Counter
from importlib import resources
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.tiny import make_splits, prompt_splits, scenes
from addiff_env.tiny.hard_negatives import hard_negative
from addiff_env.tiny.prompts import CATEGORIES, SHAPES, SIZES, ObjectSpec, Prompt, parse_caption, sample_prompt

# Fixed for WORLD_VERSION 1: every reported figure is about these rows.
DIGESTS = {
    "dev": "46a60834ee0b28f71ab51d6bc939980618c488f5b15a14d593c53419d0ac46ce",
    "test": "62022254b1a992e812369555995cc7587fc14aa93c5e8f504ce96c24fcd6a01b",
    "final": "f1736f116fe74021a2f0eb4dc07617729a146b1851bd6260d9a36f28d8824dc7",
}
categories = st.sampled_from(CATEGORIES)
seeds = st.integers(0, 2**32 - 1)


def draw(category: str, seed: int) -> tuple[Prompt, scenes.Scene]:
    rng = np.random.default_rng(seed)
    prompt = sample_prompt(rng, category)
    return prompt, scenes.sample_scene(rng, prompt)


# ------------------------------------------------------------------ captions


@given(categories, seeds)
def test_parse_caption_inverts_caption(category: str, seed: int) -> None:
    prompt, _ = draw(category, seed)
    assert prompt.category == category
    assert parse_caption(prompt.caption) == prompt
    assert parse_caption(f"  {prompt.caption.upper()}. ") == prompt


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("a small ring", Prompt("single_object", (ObjectSpec("ring", None, "small"),))),
        ("an orange cross", Prompt("colors", (ObjectSpec("cross", "orange"),))),
        ("three blue crosses", Prompt("counting", (ObjectSpec("cross", "blue", None, 3),))),
        ("a star and a large circle", Prompt("two_objects", (ObjectSpec("star"), ObjectSpec("circle", None, "large")))),
        ("a star above a ring", Prompt("position", (ObjectSpec("star"), ObjectSpec("ring")), "above")),
        (
            "a red star, a pink ring and a blue star",
            Prompt(
                "three_objects", (ObjectSpec("star", "red"), ObjectSpec("ring", "pink"), ObjectSpec("star", "blue"))
            ),
        ),
    ],
)
def test_captions_by_hand(caption: str, prompt: Prompt) -> None:
    assert prompt.caption == caption
    assert parse_caption(caption) == prompt


@pytest.mark.parametrize(
    "caption", ["", "a dog", "five stars", "a red", "a shiny star", "star", "a star and", "two star"]
)
def test_foreign_captions_are_refused_with_the_text(caption: str) -> None:
    with pytest.raises(ValueError, match="embedded world") as error:
        parse_caption(caption)
    assert repr(caption) in str(error.value)


def test_complexity_counts_requirements() -> None:
    assert parse_caption("a star").complexity == 1
    assert parse_caption("three small red stars").complexity == 9
    assert parse_caption("a red star left of a blue ring").complexity == 5


# ------------------------------------------------------------------ scenes


@given(categories, seeds)
def test_scene_shows_exactly_the_prompt(category: str, seed: int) -> None:
    prompt, scene = draw(category, seed)
    left = list(scene.objects)
    # Specs that ask for more are served first, so that an open one does not take what they need.
    for spec in sorted(prompt.objects, key=lambda s: (s.color is None) + (s.size is None)):
        for _ in range(spec.count):
            left.remove(next(item for item in left if fits(item, spec)))
    assert left == []
    if prompt.relation:
        a, b = scene.objects
        assert (a.shape, b.shape) == (prompt.objects[0].shape, prompt.objects[1].shape)
        assert scenes.relation_holds(prompt.relation, (a.x, a.y), (b.x, b.y))


def fits(item: scenes.SceneObject, spec: ObjectSpec) -> bool:
    low, high = SIZES[spec.size] if spec.size else (0, np.inf)
    return item.shape == spec.shape and spec.color in (None, item.color) and low <= item.radius <= high


@given(categories, seeds)
def test_objects_lie_inside_and_apart(category: str, seed: int) -> None:
    _, scene = draw(category, seed)
    for item in scene.objects:
        reach = item.radius * scenes.EXTENT[item.shape]
        assert reach < min(item.x, item.y, scenes.SIZE - item.x, scenes.SIZE - item.y)
    drawn = [scenes.shape_coverage(o.shape, o.x, o.y, o.radius) > 0 for o in scene.objects]
    assert not any((a & b).any() for a, b in combinations(drawn, 2))


@pytest.mark.parametrize(
    ("relation", "a", "b", "holds"),
    [
        ("left of", (10, 30), (40, 30), True),
        ("right of", (10, 30), (40, 30), False),
        ("above", (30, 10), (30, 40), True),  # y grows downwards
        ("below", (30, 10), (30, 40), False),
        ("left of", (10, 10), (25, 45), False),  # 15 along, 35 across
        ("above", (10, 10), (25, 45), True),
        ("left of", (10, 10), (40, 40), True),  # a diagonal is both
        ("above", (10, 10), (40, 40), True),
        ("left of", (20, 20), (20, 20), False),
    ],
)
def test_relations_by_hand(relation: str, a: tuple[int, int], b: tuple[int, int], holds: bool) -> None:
    assert scenes.relation_holds(relation, a, b) is holds


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_lies_within_its_bounding_circle(shape: str) -> None:
    coverage = scenes.shape_coverage(shape, 30.3, 33.8, 11.0)
    assert coverage.min() == 0 and coverage.max() == 1
    ys, xs = np.nonzero(coverage > 0)
    reach = np.hypot(xs + 0.5 - 30.3, ys + 0.5 - 33.8).max()
    assert abs(reach - 11.0 * scenes.EXTENT[shape]) < 1.5


def test_render_is_reproducible() -> None:
    _, scene = draw("four_objects", 3)
    picture = scenes.render(scene)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, scenes.render(draw("four_objects", 3)[1]))


def test_unknown_names_are_quoted(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="'colour'"):
        sample_prompt(rng, "colour")
    with pytest.raises(ValueError, match="'train'"):
        prompt_splits.build_split("train")
    with pytest.raises(ValueError, match="'val'"):
        prompt_splits.load_split("val")


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize("name", prompt_splits.SPLITS)
def test_splits_are_fixed(name: str) -> None:
    shipped = resources.files("addiff_env.tiny") / "splits" / f"{name}.jsonl"
    assert hashlib.sha256(shipped.read_bytes()).hexdigest() == DIGESTS[name]
    assert prompt_splits.build_split(name) == list(prompt_splits.load_split(name))


@pytest.mark.parametrize("name", ["dev", "test"])
def test_splits_are_large_balanced_and_held_out(name: str) -> None:
    rows = prompt_splits.load_split(name)
    counts = Counter(row["category"] for row in rows)
    assert len(rows) >= 1000 and set(counts) == set(CATEGORIES) and len(set(counts.values())) == 1
    assert len({(row["prompt"], row["seed"]) for row in rows}) == len(rows)
    for row in rows:
        prompt = parse_caption(row["prompt"])
        assert prompt.category == row["category"]
        if prompt.category != "single_object":
            assert prompt_splits.caption_split(prompt) == name


def test_no_evaluation_caption_is_a_training_caption(rng: np.random.Generator) -> None:
    held_out = {
        row["prompt"]
        for name in ("dev", "test")
        for row in prompt_splits.load_split(name)
        if row["category"] != "single_object"
    }
    drawn = {prompt_splits.sample_train_prompt(rng).caption for _ in range(3000)}
    shipped = resources.files("addiff_env.tiny").joinpath("splits", "train.txt").read_text().splitlines()
    assert not held_out & (drawn | set(shipped))


def meaning(caption: str) -> tuple[frozenset[ObjectSpec] | tuple[ObjectSpec, ...], str | None]:
    """Objects, in any order where nothing relates them; no caption asks for the same object twice."""
    prompt = parse_caption(caption)
    return (prompt.objects if prompt.relation else frozenset(prompt.objects)), prompt.relation


def test_the_final_split_has_pairs_that_nobody_has_seen() -> None:
    rows = prompt_splits.load_split("final")
    assert len({(row["prompt"], row["seed"]) for row in rows}) == len({row["seed"] for row in rows}) == 1024
    counts = Counter(parse_caption(row["prompt"]).category for row in rows)
    assert len(set(counts.values())) == 1 and counts == Counter(row["category"] for row in rows)
    shipped = resources.files("addiff_env.tiny").joinpath("splits", "train.txt").read_text().splitlines()
    others = [row for name in ("dev", "test") for row in prompt_splits.load_split(name)]
    assert not {row["seed"] for row in rows} & {row["seed"] for row in others}
    known = {meaning(caption) for caption in (*shipped, *(row["prompt"] for row in others))}
    assert not known & {meaning(row["prompt"]) for row in rows}


def test_training_cannot_draw_what_the_final_split_asks_for(rng: np.random.Generator) -> None:
    prompts = [parse_caption(row["prompt"]) for row in prompt_splits.load_split("final")]
    assert all(prompt_splits.caption_split(prompt) != "train" for prompt in prompts)
    wanted = {meaning(prompt.caption) for prompt in prompts}
    drawn = [
        prompt_splits.sample_train_prompt(rng, category)
        for category in prompt_splits.FINAL_CATEGORIES
        for _ in range(1000)
    ]
    negatives = [hard_negative(rng, prompt) for prompt in drawn]
    assert not wanted & {meaning(prompt.caption) for prompt in (*drawn, *negatives)}


@given(st.sampled_from(("color_attribution", "three_objects", "four_objects", "two_objects")), seeds)
def test_object_order_does_not_move_a_caption_between_splits(category: str, seed: int) -> None:
    prompt, _ = draw(category, seed)
    turned = Prompt(prompt.category, prompt.objects[::-1], prompt.relation)
    assert prompt_splits.caption_split(turned) == prompt_splits.caption_split(prompt)


def test_training_captions_are_as_generated() -> None:
    shipped = resources.files("addiff_env.tiny").joinpath("splits", "train.txt").read_text().splitlines()
    assert shipped == make_splits.train_captions()
    assert len(set(shipped)) == len(shipped) == 6000
    assert {parse_caption(caption).category for caption in shipped} == set(CATEGORIES)


def test_balanced_takes_categories_in_turn() -> None:
    rows = prompt_splits.balanced(prompt_splits.load_split("dev"), 20)
    assert [row["category"] for row in rows] == [CATEGORIES[i % len(CATEGORIES)] for i in range(20)]
    final, four = prompt_splits.load_split("final"), prompt_splits.FINAL_CATEGORIES  # not all categories
    rows = prompt_splits.balanced(final, 10)
    assert [row["category"] for row in rows] == [four[i % 4] for i in range(10)]
    assert len(prompt_splits.balanced(final, 5000)) == 1024
