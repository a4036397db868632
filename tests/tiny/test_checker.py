from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from addiff_env.tiny import checker, scenes
from addiff_env.tiny.prompts import CATEGORIES, COLORS, NUMBERS, SHAPES, SIZES, Prompt, sample_prompt

NUMBER = 250  # pictures per category
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@cache
def pairs(category: str, number: int = NUMBER) -> list[tuple[np.ndarray, Prompt]]:
    rng = np.random.default_rng(1_000 + CATEGORIES.index(category))
    prompts = [sample_prompt(rng, category) for _ in range(number)]
    return [(scenes.render(scenes.sample_scene(rng, prompt)), prompt) for prompt in prompts]


def corrupt(rng: np.random.Generator, prompt: Prompt) -> Prompt:
    """Change one attribute, count or the relation, so that no picture satisfies both prompts."""
    index = int(rng.integers(len(prompt.objects)))
    spec = prompt.objects[index]

    def other(values: Iterable[str], value: str | None) -> str:
        return str(rng.choice([v for v in values if v != value]))

    changes: list[dict[str, Any]] = [{"shape": other(SHAPES, spec.shape)}]
    if spec.color:
        changes.append({"color": other(COLORS, spec.color)})
    if spec.size:
        changes.append({"size": other(SIZES, spec.size)})
    if spec.count > 1:
        changes.append({"count": NUMBERS[other(NUMBERS, next(w for w, n in NUMBERS.items() if n == spec.count))]})
    choice = int(rng.integers(len(changes) + (prompt.relation is not None)))
    if choice == len(changes):
        return replace(prompt, relation=OPPOSITE[str(prompt.relation)])
    objects = (*prompt.objects[:index], replace(spec, **changes[choice]), *prompt.objects[index + 1 :])
    return replace(prompt, objects=objects)


# ------------------------------------------------------------------ accuracy on rendered truth


@pytest.mark.parametrize("category", CATEGORIES)
def test_right_on_rendered_truth(category: str) -> None:
    verdicts = [(checker.check_picture(picture, prompt), prompt) for picture, prompt in pairs(category)]
    failures = [(prompt.caption, verdict.reason) for verdict, prompt in verdicts if not verdict.satisfied]
    assert len(failures) <= 0.005 * NUMBER, failures
    assert all((v.score == 1) == v.satisfied == (v.reason == "ok") for v, _ in verdicts)


@pytest.mark.parametrize("category", CATEGORIES)
def test_wrong_pairs_are_refused(category: str, rng: np.random.Generator) -> None:
    wrong = [(picture, prompt, corrupt(rng, prompt)) for picture, prompt in pairs(category)]
    passed = [
        f"{prompt.caption} shown for {asked.caption}"
        for picture, prompt, asked in wrong
        if checker.check_picture(picture, asked).satisfied
    ]
    assert len(passed) <= 0.01 * NUMBER, passed


def test_positions_and_sizes_are_read() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        scene = scenes.sample_scene(rng, sample_prompt(rng, "color_attribution"))
        drawn = sorted(scene.objects, key=lambda item: (item.x, item.y))
        for found, item in zip(checker.read_objects(scenes.render(scene)), drawn, strict=True):
            assert (found.shape, found.color) == (item.shape, item.color)
            assert np.hypot(found.x - item.x, found.y - item.y) < 0.5
            assert abs(found.radius - item.radius) < 0.5


# ------------------------------------------------------------------ pictures not made by our renderer


def canvas(grey: int = 200) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (512, 512), (grey, grey, grey))
    return image, ImageDraw.Draw(image)


def finish(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX))


def polygon(number: int, x: float, y: float, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    angles = -np.pi / 2 + 2 * np.pi * np.arange(number) / number
    distances = [radii[i % len(radii)] for i in range(number)]
    return [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(distances, angles, strict=True)]


def paint(draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], x: int, y: int) -> None:
    if shape == "circle":
        draw.ellipse((x - 70, y - 70, x + 70, y + 70), fill=fill)
    elif shape == "ring":
        draw.ellipse((x - 80, y - 80, x + 80, y + 80), outline=fill, width=40)
    elif shape == "square":
        draw.rectangle((x - 65, y - 65, x + 65, y + 65), fill=fill)
    elif shape == "triangle":
        draw.polygon(polygon(3, x, y, (95,)), fill=fill)
    elif shape == "star":
        draw.polygon(polygon(10, x, y, (100, 43)), fill=fill)
    else:
        draw.rectangle((x - 80, y - 28, x + 80, y + 28), fill=fill)
        draw.rectangle((x - 28, y - 80, x + 28, y + 80), fill=fill)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_hand_made_object_is_read(shape: str, color: str) -> None:
    image, draw = canvas()
    paint(draw, shape, COLORS[color], 200, 300)
    (found,) = checker.read_objects(finish(image))
    assert (found.shape, found.color) == (shape, color)
    assert np.hypot(found.x - 25.0, found.y - 37.5) < 0.5


def red_square_left_of_blue_circle() -> np.ndarray:
    image, draw = canvas(90)
    paint(draw, "square", (225, 30, 40), 130, 250)
    paint(draw, "circle", (40, 80, 225), 380, 260)
    return finish(image)


@pytest.mark.parametrize(
    ("caption", "score", "reason"),
    [
        ("a red square left of a blue circle", 1, "ok"),
        ("a blue circle and a red square", 1, "ok"),
        ("a circle and a square", 1, "ok"),
        # shape, colour; shape, colour; nothing else
        ("a red circle and a blue circle", 4 / 5, "a red circle looks like red square"),
        ("a red square and a green circle", 4 / 5, "a green circle is blue"),
        # shape, colour; shape, colour; relation; nothing else
        ("a red square right of a blue circle", 5 / 6, "first object not right of second"),
        ("a blue circle above a red square", 5 / 6, "first object not above second"),
        # shape; nothing else
        ("a circle", 1 / 2, "1 object(s) too many: 1 blue circle, 1 red square"),
        # shape, colour; shape, colour; a missing one's shape, colour; nothing else
        ("a red square, a blue circle and a pink star", 5 / 7, "a pink star is missing"),
        # four circles: one there, one a square, two missing; nothing else
        ("four circles", 2 / 5, "a circle looks like red square"),
    ],
)
def test_score_by_hand(caption: str, score: float, reason: str) -> None:
    verdict = checker.check_picture(red_square_left_of_blue_circle(), caption)
    assert verdict.score == pytest.approx(score)
    assert verdict.satisfied == (score == 1)
    assert verdict.reason == reason


def test_sizes_by_hand() -> None:
    image, draw = canvas()
    draw.ellipse((60, 60, 160, 160), fill=COLORS["green"])  # radius 6.25
    draw.ellipse((250, 250, 430, 430), fill=COLORS["pink"])  # radius 11.25
    small, large = checker.read_objects(finish(image))
    assert (small.size, large.size) == ("small", "large")
    assert small.radius == pytest.approx(6.25, abs=0.2) and large.radius == pytest.approx(11.25, abs=0.2)


def test_a_shapeless_blob_is_unknown() -> None:
    image, draw = canvas()
    draw.rectangle((60, 200, 460, 230), fill=COLORS["red"])
    (found,) = checker.read_objects(finish(image))
    assert found.shape == "unknown" and found.iou < checker.MIN_IOU
    assert not checker.check_picture(finish(image), "a red square").satisfied


def test_between_square_and_circle_there_is_neither() -> None:
    shapes = []
    for corner in range(0, 101, 10):  # eighths of a pixel; at 100 the square has become a circle
        image, draw = canvas()
        draw.rounded_rectangle((150, 150, 350, 350), radius=corner, fill=COLORS["red"])
        (found,) = checker.read_objects(finish(image))
        shapes.append(found.shape)
    assert shapes[0] == "square" and shapes[-1] == "circle" and "unknown" in shapes
    order = ["square", "unknown", "circle"]
    assert [order.index(shape) for shape in shapes] == sorted(order.index(shape) for shape in shapes)


def test_an_object_cut_by_the_border_is_read() -> None:
    image, draw = canvas()
    paint(draw, "circle", COLORS["blue"], 40, 256)
    (found,) = checker.read_objects(finish(image))
    assert found.color == "blue" and 0 < found.x < 10


# ------------------------------------------------------------------ blank and bad pictures


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_blank_picture_has_no_objects(level: int) -> None:
    blank = np.full((64, 64, 3), level, np.uint8)
    verdict = checker.check_picture(blank, "a red circle")
    assert verdict.objects == () and not verdict.satisfied
    assert verdict.score == pytest.approx(1 / 3)  # only "nothing else" is met
    assert verdict.reason == "a red circle is missing"


def test_noise_is_not_an_object(rng: np.random.Generator) -> None:
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not checker.check_picture(noise, "a red circle").satisfied


def test_float_and_uint8_pictures_read_alike() -> None:
    picture = red_square_left_of_blue_circle()
    assert checker.read_objects(picture) == checker.read_objects(picture / 255)


@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (32, 32, 3), (1, 64, 64, 3), (64, 64, 4)])
def test_wrong_shape_is_quoted(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        checker.read_objects(np.zeros(shape, np.uint8))
    assert str(shape) in str(error.value)


def test_bad_values_are_quoted() -> None:
    picture = np.zeros((64, 64, 3))
    picture[3, 4, 1] = 1.5
    with pytest.raises(ValueError, match=r"1\.5"):
        checker.read_objects(picture)
    picture[3, 4, 1] = -0.25
    with pytest.raises(ValueError, match=r"-0\.25"):
        checker.read_objects(picture)
    for value in (np.nan, np.inf):
        picture[3, 4, 1] = value
        with pytest.raises(ValueError, match="non-finite"):
            checker.read_objects(picture)


def test_foreign_caption_is_quoted() -> None:
    with pytest.raises(ValueError, match="'a dog'"):
        checker.check_picture(red_square_left_of_blue_circle(), "a dog")


# ------------------------------------------------------------------ why the search may stop early


@pytest.mark.parametrize("radius", [3.0, 6.0, 9.0, 13.0])
def test_different_templates_overlap_little(radius: float) -> None:
    area = np.pi * radius**2
    templates = [
        scenes.shape_coverage(shape, 32.2, 31.7, np.sqrt(area / checker._unit_template(shape)[0])) for shape in SHAPES
    ]
    overlaps = [np.minimum(a, b).sum() / np.maximum(a, b).sum() for i, a in enumerate(templates) for b in templates[:i]]
    assert max(overlaps) < 2 * checker.DECISIVE_IOU - 1
