import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.tiny.prompts import CATEGORIES, ObjectSpec, Prompt, parse_caption, sample_prompt

categories = st.sampled_from(CATEGORIES)
seeds = st.integers(0, 2**32 - 1)


@given(categories, seeds)
def test_parse_caption_inverts_caption(category: str, seed: int) -> None:
    prompt = sample_prompt(np.random.default_rng(seed), category)
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
