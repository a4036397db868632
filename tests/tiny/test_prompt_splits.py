import hashlib
from collections import Counter
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.tiny import make_splits, prompt_splits
from addiff_env.tiny.hard_negatives import hard_negative
from addiff_env.tiny.prompts import CATEGORIES, ObjectSpec, Prompt, parse_caption, sample_prompt

# Fixed for WORLD_VERSION 1: every reported figure is about these rows.
DIGESTS = {
    "dev": "46a60834ee0b28f71ab51d6bc939980618c488f5b15a14d593c53419d0ac46ce",
    "test": "62022254b1a992e812369555995cc7587fc14aa93c5e8f504ce96c24fcd6a01b",
    "final": "f1736f116fe74021a2f0eb4dc07617729a146b1851bd6260d9a36f28d8824dc7",
}
categories = st.sampled_from(CATEGORIES)
seeds = st.integers(0, 2**32 - 1)


def test_unknown_names_are_quoted(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="'colour'"):
        sample_prompt(rng, "colour")
    with pytest.raises(ValueError, match="'train'"):
        prompt_splits.build_split("train")
    with pytest.raises(ValueError, match="'val'"):
        prompt_splits.load_split("val")


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
    prompt = sample_prompt(np.random.default_rng(seed), category)
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
