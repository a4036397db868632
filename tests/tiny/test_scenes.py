from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.tiny import scenes
from addiff_env.tiny.prompts import CATEGORIES, SHAPES, SIZES, ObjectSpec, Prompt, sample_prompt

categories = st.sampled_from(CATEGORIES)
seeds = st.integers(0, 2**32 - 1)


def draw(category: str, seed: int) -> tuple[Prompt, scenes.Scene]:
    rng = np.random.default_rng(seed)
    prompt = sample_prompt(rng, category)
    return prompt, scenes.sample_scene(rng, prompt)


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
