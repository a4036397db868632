"""The embedded world: scenes of coloured shapes, their pictures and their captions.

A *prompt* is a caption with its meaning (`Prompt`); a *scene* is one arrangement of objects that
satisfies it (`Scene`); `render` draws a scene. The prompt categories mirror GenEval's tasks
(Ghosh, Hajishirzi & Schmidt 2023) plus scenes of three and four objects.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import combinations
from typing import Any

import numpy as np

SIZE = 64  # picture height and width, pixels
WORLD_VERSION = 1  # part of every split; bump whenever a caption or a split could change

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {  # sRGB, 0-255; hues at least 24 degrees apart so that `checker` can tell them
    "red": (222, 36, 44),
    "orange": (243, 135, 28),
    "yellow": (244, 222, 40),
    "green": (48, 174, 66),
    "cyan": (48, 204, 214),
    "blue": (44, 86, 222),
    "purple": (142, 60, 204),
    "pink": (248, 104, 186),
}
# The colour a shape takes most of the time when its caption leaves it open, as bananas are yellow.
TYPICAL_COLOR = {
    "circle": "red",
    "square": "blue",
    "triangle": "green",
    "star": "yellow",
    "cross": "purple",
    "ring": "orange",
}
TYPICAL_SHARE = 0.85
SIZES = {"small": (6.8, 7.8), "large": (10.4, 12.4)}  # radius ranges, pixels
SIZE_BOUNDARY = 9.1  # radius, pixels: below it an object counts as small, above as large
RELATION_AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # x or y, direction
RELATIONS = tuple(RELATION_AXES)
NUMBERS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "color_attribution",
    "three_objects",
    "four_objects",
)
# Radius range (pixels) of objects whose size the prompt leaves open, by number of objects.
_FREE_RADIUS = {1: (7.4, 12.2), 2: (7.2, 11.0), 3: (7.0, 9.2), 4: (6.8, 8.6)}
_MARGIN = 3.0  # least gap between two objects' bounding circles, pixels
_ACROSS = 9.0  # most that a related pair is displaced across its relation's axis, pixels


@dataclass(frozen=True)
class ObjectSpec:
    """What a prompt asks of one kind of object; None leaves the attribute open."""

    shape: str
    color: str | None = None
    size: str | None = None
    count: int = 1

    def phrase(self) -> str:
        """The words for it, e.g. ``a small red circle`` or ``three stars``."""
        noun = self.shape if self.count == 1 else _plural(self.shape)
        attributes = " ".join(word for word in (self.size, self.color, noun) if word)
        if self.count > 1:
            return f"{_number_word(self.count)} {attributes}"
        return f"{'an' if attributes[0] in 'aeiou' else 'a'} {attributes}"


@dataclass(frozen=True)
class Prompt:
    """A caption of the world and its meaning; ``relation`` holds between the first two objects."""

    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The text, e.g. ``a red circle left of a blue square``."""
        phrases = [spec.phrase() for spec in self.objects]
        if self.relation:
            return f"{phrases[0]} {self.relation} {phrases[1]}"
        if len(phrases) < 3:
            return " and ".join(phrases)
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"

    @property
    def complexity(self) -> int:
        """Number of facts a picture must get right: objects, attributes and relations."""
        facts = sum(s.count * (1 + (s.color is not None) + (s.size is not None)) for s in self.objects)
        return facts + (self.relation is not None)


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: centre (x right, y down) and nominal radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)  # drawn colour, [0, 1]


@dataclass(frozen=True)
class Background:
    """A near-grey linear gradient: two RGB ends in [0, 1] and the direction in radians."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    angle: float


@dataclass(frozen=True)
class Scene:
    """Objects on a background."""

    objects: tuple[SceneObject, ...]
    background: Background


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _number_word(count: int) -> str:
    return next(word for word, value in NUMBERS.items() if value == count)


# --------------------------------------------------------------------------- reading captions


def parse_caption(caption: str) -> Prompt:
    """Read a caption of the world back into its meaning (the inverse of `Prompt.caption`).

    Raises:
        ValueError: the text is not a caption of this world; the message quotes what was not understood.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    for relation in RELATIONS:
        left, found, right = text.partition(f" {relation} ")
        if found:
            return _with_category((_parse_object(left, caption), _parse_object(right, caption)), relation)
    parts = re.split(r", and |, | and ", text)
    return _with_category(tuple(_parse_object(part, caption) for part in parts), None)


def _parse_object(phrase: str, caption: str) -> ObjectSpec:
    article, *words = phrase.split() or [""]
    count = 1 if article in ("a", "an", "one") else NUMBERS.get(article)
    shapes = {name: name for name in SHAPES} if count == 1 else {_plural(name): name for name in SHAPES}
    if count is None or not words or words[-1] not in shapes:
        raise ValueError(f"not a caption of the embedded world: {phrase!r} in {caption!r}")
    *attributes, noun = words
    size = attributes.pop(0) if attributes and attributes[0] in SIZES else None
    color = attributes.pop(0) if attributes and attributes[0] in COLORS else None
    if attributes:
        raise ValueError(f"not a caption of the embedded world: {attributes[0]!r} in {caption!r}")
    return ObjectSpec(shapes[noun], color, size, count)


def _with_category(objects: tuple[ObjectSpec, ...], relation: str | None) -> Prompt:
    return Prompt(_category(objects, relation), objects, relation)


def _category(objects: tuple[ObjectSpec, ...], relation: str | None) -> str:
    if relation:
        return "position"
    if any(spec.count > 1 for spec in objects):
        return "counting"
    if len(objects) == 1:
        return "colors" if objects[0].color else "single_object"
    if len(objects) == 2:
        return "color_attribution" if all(spec.color for spec in objects) else "two_objects"
    return "three_objects" if len(objects) == 3 else "four_objects"


# --------------------------------------------------------------------------- drawing at random


def sample_prompt(rng: np.random.Generator, category: str) -> Prompt:
    """Draw a prompt of one of `CATEGORIES`.

    Raises:
        ValueError: unknown category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")
    shapes = [str(s) for s in rng.permutation(SHAPES)]
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    relation: str | None = None
    if category == "single_object":
        objects: tuple[ObjectSpec, ...] = (ObjectSpec(shapes[0], None, _maybe_size(rng)),)
    elif category == "colors":
        objects = (ObjectSpec(shapes[0], colors[0], _maybe_size(rng)),)
    elif category == "counting":
        color = colors[0] if rng.random() < 0.7 else None
        objects = (ObjectSpec(shapes[0], color, None, int(rng.integers(2, 5))),)
    elif category == "two_objects":
        objects = tuple(ObjectSpec(shapes[i], None, _maybe_size(rng)) for i in range(2))
    elif category == "position":
        colored = rng.random() < 0.75
        objects = tuple(ObjectSpec(shapes[i], colors[i] if colored else None) for i in range(2))
        relation = str(rng.choice(RELATIONS))
    else:
        number = {"color_attribution": 2, "three_objects": 3, "four_objects": 4}[category]
        picks = rng.integers(len(SHAPES), size=number)  # a shape may come twice, a colour may not
        objects = tuple(ObjectSpec(SHAPES[k], colors[i]) for i, k in enumerate(picks))
    return Prompt(category, objects, relation)


def _maybe_size(rng: np.random.Generator) -> str | None:
    return None if rng.random() < 0.4 else str(rng.choice(list(SIZES)))


def sample_scene(rng: np.random.Generator, prompt: Prompt) -> Scene:
    """Draw a scene that satisfies ``prompt``: free attributes at random, no two objects touching.

    A colour that the prompt leaves open is the shape's `TYPICAL_COLOR` in `TYPICAL_SHARE` of the draws. A related
    pair is placed as people would draw it: one object in each half of the picture, little offset across.
    """
    kinds = [replace(spec, color=_sample_color(rng, spec)) for spec in prompt.objects for _ in range(spec.count)]
    if prompt.relation is None:
        kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    while True:
        radii = [_sample_radius(rng, spec, len(kinds)) for spec in kinds]
        reach = [r * EXTENT[spec.shape] for r, spec in zip(radii, kinds, strict=True)]
        centres = _place(rng, reach, prompt.relation)
        if centres is not None:
            break
    objects = []
    for spec, radius, (x, y) in zip(kinds, radii, centres, strict=True):
        assert spec.color is not None
        objects.append(SceneObject(spec.shape, spec.color, x, y, radius, _jitter(rng, COLORS[spec.color])))
    return Scene(tuple(objects), _sample_background(rng))


def _sample_color(rng: np.random.Generator, spec: ObjectSpec) -> str:
    if spec.color:
        return spec.color
    return TYPICAL_COLOR[spec.shape] if rng.random() < TYPICAL_SHARE else str(rng.choice(list(COLORS)))


def _sample_radius(rng: np.random.Generator, spec: ObjectSpec, number: int) -> float:
    low, high = SIZES[spec.size] if spec.size else _FREE_RADIUS[number]
    return float(rng.uniform(low, high))


def _place(rng: np.random.Generator, reach: list[float], relation: str | None) -> list[tuple[float, float]] | None:
    """Centres by rejection; ``reach`` are bounding radii. None when this draw found no room."""
    for _ in range(60):
        xy = [rng.uniform(r + 1.0, SIZE - 1.0 - r, size=2) for r in reach]
        apart = all(
            np.hypot(*(xy[i] - xy[j])) >= reach[i] + reach[j] + _MARGIN for i, j in combinations(range(len(xy)), 2)
        )
        if apart and (relation is None or _faces(relation, xy[0], xy[1])):
            return [(float(x), float(y)) for x, y in xy]
    return None


def _faces(relation: str, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether ``a`` lies in the half of the picture that the relation names, ``b`` in the other, about level."""
    along, sign = RELATION_AXES[relation]
    sides = sign * (a[along] - SIZE / 2), sign * (b[along] - SIZE / 2)
    return sides[0] > 0 > sides[1] and abs(a[1 - along] - b[1 - along]) <= _ACROSS


def relation_holds(relation: str, a: Any, b: Any, margin: float = 0.0, slope: float = 0.5) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``; (x, y) centres in pixels, y downwards.

    As in GenEval, the displacement along the relation's axis must exceed ``margin`` and half (``slope``)
    of the displacement across it, so that a diagonal arrangement may satisfy two relations at once.
    """
    dx, dy = float(a[0] - b[0]), float(a[1] - b[1])
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > margin and along > slope * across


def _jitter(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    drawn = np.clip(np.asarray(rgb) * rng.uniform(0.92, 1.04) + rng.uniform(-5, 5, 3), 0, 255) / 255
    return (float(drawn[0]), float(drawn[1]), float(drawn[2]))


def _sample_background(rng: np.random.Generator) -> Background:
    level = rng.uniform(0.12, 0.95)
    ends = []
    for _ in range(2):
        grey = np.clip(level + rng.uniform(-0.15, 0.15), 0.08, 0.97)
        ends.append(tuple(float(v) for v in np.clip(grey + rng.uniform(-0.025, 0.025, 3), 0, 1)))
    return Background(ends[0], ends[1], float(rng.uniform(0, 2 * np.pi)))  # type: ignore[arg-type]


# --------------------------------------------------------------------------- drawing pictures


def _polygon(points: list[tuple[float, float]]) -> np.ndarray:
    return np.asarray(points, dtype=np.float64)  # (vertices, 2)


def _regular(number: int, radius: float, inner: float | None = None) -> np.ndarray:
    count = number if inner is None else 2 * number
    angles = -np.pi / 2 + 2 * np.pi * np.arange(count) / count
    radii = np.full(count, radius) if inner is None else np.where(np.arange(count) % 2, inner, radius)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


_ARM = 0.40
# Outlines at nominal radius 1, centroid at the origin, scaled so that every shape has a similar area.
_OUTLINES = {
    "square": _polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
    "triangle": _regular(3, 1.35),
    "star": _regular(5, 1.42, 0.62),
    "cross": _polygon(
        [(-_ARM, -1.15), (_ARM, -1.15), (_ARM, -_ARM), (1.15, -_ARM), (1.15, _ARM), (_ARM, _ARM)]
        + [(_ARM, 1.15), (-_ARM, 1.15), (-_ARM, _ARM), (-1.15, _ARM), (-1.15, -_ARM), (-_ARM, -_ARM)]
    ),
}
_RING = (1.12, 0.56)  # outer and inner radius
EXTENT = {"circle": 1.0, "ring": _RING[0]} | {  # bounding radius at nominal radius 1
    name: float(np.hypot(*outline.T).max()) for name, outline in _OUTLINES.items()
}


def _polygon_distance(points: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """Signed distance (P,) of ``points`` (P, 2) to a polygon, negative inside."""
    a, b = outline, np.roll(outline, -1, axis=0)
    # One plain (V, P) array per axis: several times faster than reducing over a last axis of two.
    edge_x, edge_y = (b - a).T[..., None]  # (V, 1) each
    x, y = points[:, 0] - a[:, :1], points[:, 1] - a[:, 1:]
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    distance = np.hypot(x - along * edge_x, y - along * edge_y).min(0)
    below_a, below_b = y < 0, points[:, 1] >= b[:, 1:]
    left = edge_x * y - edge_y * x > 0
    winding = (~below_a & ~below_b & left).sum(0) - (below_a & below_b & ~left).sum(0)
    return np.where(winding != 0, -distance, distance)


def shape_coverage(shape: str, x: float, y: float, radius: float, size: int = SIZE) -> np.ndarray:
    """Anti-aliased coverage (size, size) in [0, 1] of one shape; centre and radius in pixels."""
    coverage = np.zeros((size, size))
    reach = radius * EXTENT[shape] + 1.5
    x0, x1 = max(0, int(x - reach)), min(size, int(x + reach) + 2)
    y0, y1 = max(0, int(y - reach)), min(size, int(y + reach) + 2)
    if x0 >= x1 or y0 >= y1:
        return coverage
    gx, gy = np.meshgrid(np.arange(x0, x1) + 0.5 - x, np.arange(y0, y1) + 0.5 - y)
    if shape in _OUTLINES:
        points = np.stack([gx.ravel(), gy.ravel()], axis=1)
        distance = _polygon_distance(points, radius * _OUTLINES[shape]).reshape(gx.shape)
    else:
        centre_distance = np.hypot(gx, gy)
        distance = centre_distance - radius * (_RING[0] if shape == "ring" else 1.0)
        if shape == "ring":
            distance = np.maximum(distance, radius * _RING[1] - centre_distance)
    coverage[y0:y1, x0:x1] = np.clip(0.5 - distance, 0, 1)
    return coverage


def render(scene: Scene) -> np.ndarray:
    """Draw a scene: uint8 RGB picture (64, 64, 3)."""
    background = scene.background
    axis = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    ramp = np.cos(background.angle) * axis[None, :] + np.sin(background.angle) * axis[:, None] + 0.5
    weight = np.clip(ramp, 0, 1)[..., None]
    picture = (1 - weight) * np.asarray(background.start) + weight * np.asarray(background.end)
    for item in scene.objects:
        alpha = shape_coverage(item.shape, item.x, item.y, item.radius)[..., None]
        picture = (1 - alpha) * picture + alpha * np.asarray(item.rgb)
    return np.round(picture * 255).astype(np.uint8)


# --------------------------------------------------------------------------- splits


def caption_split(prompt: Prompt) -> str:
    """``train``, ``dev`` or ``test``: where this prompt's meaning belongs (80/10/10 by hash).

    Captions that differ only in the order of their objects fall into the same split.
    """
    if prompt.category == "single_object":
        return "train"  # too few of them: they occur in every split
    specs = [f"{s.count} {s.size} {s.color} {s.shape}" for s in prompt.objects]
    if prompt.relation is None:
        specs.sort()
    key = f"v{WORLD_VERSION}|{'|'.join(specs)}|{prompt.relation}"
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")


def sample_train_prompt(rng: np.random.Generator, category: str | None = None) -> Prompt:
    """Draw a prompt that belongs to no evaluation split; a random category by default."""
    while True:
        prompt = sample_prompt(rng, category or str(rng.choice(CATEGORIES)))
        if caption_split(prompt) == "train":
            return prompt


def build_split(name: str, per_category: int = 128) -> list[dict[str, Any]]:
    """Make an evaluation split anew: rows of ``prompt``, ``seed``, ``category``, balanced.

    Raises:
        ValueError: ``name`` is neither ``dev`` nor ``test``.
    """
    if name not in ("dev", "test"):
        raise ValueError(f"unknown split {name!r}; known: dev, test")
    rows = []
    for category in CATEGORIES:
        entropy = hashlib.sha256(f"v{WORLD_VERSION}|{name}|{category}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(entropy, "big"))
        wanted = "train" if category == "single_object" else name
        prompts: list[Prompt] = []
        while len(prompts) < per_category:
            prompt = sample_prompt(rng, category)
            if caption_split(prompt) == wanted:
                prompts.append(prompt)
        base = 1_000_000 * (1 + ("dev", "test").index(name)) + 1_000 * CATEGORIES.index(category)
        rows += [{"prompt": prompt.caption, "seed": base + i, "category": category} for i, prompt in enumerate(prompts)]
    return rows


@cache
def load_split(name: str) -> tuple[dict[str, Any], ...]:
    """The shipped evaluation split ``dev`` or ``test``: rows of ``prompt``, ``seed``, ``category``.

    Raises:
        ValueError: unknown split.
    """
    path = resources.files("addiff_env.tiny") / "splits" / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"unknown split {name!r}; known: dev, test")
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def balanced(rows: tuple[dict[str, Any], ...], number: int) -> list[dict[str, Any]]:
    """The first ``number`` rows of a split, taken from its categories in turn."""
    by_category = {c: [row for row in rows if row["category"] == c] for c in CATEGORIES}
    turns = [by_category[c][i] for i in range(max(map(len, by_category.values()))) for c in CATEGORIES]
    return turns[:number]


# --------------------------------------------------------------------------- wrong captions

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def hard_negative(rng: np.random.Generator, prompt: Prompt) -> Prompt:
    """A prompt that no picture of ``prompt`` satisfies: one attribute, count, relation or object changed.

    A training prompt's negative is again a training prompt, so that no evaluation caption leaks.
    """
    edits = [edit for edit in _EDITS if edit(rng, prompt) is not None]
    negatives = (edits[int(rng.integers(len(edits)))](rng, prompt) for _ in range(1000))
    keeps_split = caption_split(prompt) == "train"
    return next(n for n in negatives if n is not None and not (keeps_split and caption_split(n) != "train"))


def _edited(prompt: Prompt, changes: dict[int, ObjectSpec]) -> Prompt:
    objects = tuple(changes.get(i, spec) for i, spec in enumerate(prompt.objects))
    return _with_category(objects, prompt.relation)


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


def _edit_color(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    # A colour that the prompt does not have: recolouring can then never give the same objects again.
    used = {spec.color for spec in prompt.objects}
    colored = [i for i, spec in enumerate(prompt.objects) if spec.color]
    if not colored:
        return None
    index = _pick(rng, colored)
    return _edited(prompt, {index: replace(prompt.objects[index], color=_pick(rng, sorted(set(COLORS) - used)))})


def _edit_binding(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    """Swap the colours of two different shapes."""
    pairs = [
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(prompt.objects), 2)
        if a.color and b.color and a.color != b.color and a.shape != b.shape
    ]
    if not pairs:
        return None
    i, j = _pick(rng, pairs)
    a, b = prompt.objects[i], prompt.objects[j]
    return _edited(prompt, {i: replace(a, color=b.color), j: replace(b, color=a.color)})


def _edit_shape(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    index = int(rng.integers(len(prompt.objects)))
    repeats = len(prompt.objects) > 1 and prompt.category in ("color_attribution", "three_objects", "four_objects")
    used = {prompt.objects[index].shape} if repeats else {spec.shape for spec in prompt.objects}
    new = replace(prompt.objects[index], shape=_pick(rng, sorted(set(SHAPES) - used)))
    return _edited(prompt, {index: new})


def _edit_size(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    sized = [i for i, spec in enumerate(prompt.objects) if spec.size]
    if not sized:
        return None
    spec = prompt.objects[index := _pick(rng, sized)]
    return _edited(prompt, {index: replace(spec, size="large" if spec.size == "small" else "small")})


def _edit_count(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    if prompt.category != "counting":
        return None
    spec = prompt.objects[0]
    return _edited(prompt, {0: replace(spec, count=_pick(rng, sorted(set(NUMBERS.values()) - {spec.count})))})


def _edit_relation(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    # The opposite only: a diagonal arrangement may satisfy two relations.
    return replace(prompt, relation=_OPPOSITE[prompt.relation]) if prompt.relation else None


def _edit_objects(rng: np.random.Generator, prompt: Prompt) -> Prompt | None:
    """Leave one coloured object out, or ask for one more; a picture shows what is asked for and nothing else."""
    if prompt.category not in ("color_attribution", "three_objects", "four_objects"):
        return None
    objects = list(prompt.objects)
    if len(objects) < 4 and rng.random() < 0.5:
        color = _pick(rng, sorted(set(COLORS) - {spec.color for spec in objects}))
        objects.insert(int(rng.integers(len(objects) + 1)), ObjectSpec(_pick(rng, SHAPES), color))
    else:
        objects.pop(int(rng.integers(len(objects))))
    return _with_category(tuple(objects), None)


_EDITS = (_edit_color, _edit_binding, _edit_shape, _edit_size, _edit_count, _edit_relation, _edit_objects)
