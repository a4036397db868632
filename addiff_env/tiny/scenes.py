"""Scenes of the embedded world: coloured shapes on a near-grey background, and their pictures.

A *scene* is one arrangement of objects that satisfies a prompt (`sample_scene`); `render` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from addiff_env.tiny.prompts import COLORS, RELATION_AXES, SIZES, ObjectSpec, Prompt

SIZE = 64  # picture height and width, pixels
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
SIZE_BOUNDARY = 9.1  # radius, pixels: below it an object counts as small, above as large
# Radius range (pixels) of objects whose size the prompt leaves open, by number of objects.
_FREE_RADIUS = {1: (7.4, 12.2), 2: (7.2, 11.0), 3: (7.0, 9.2), 4: (6.8, 8.6)}
_MARGIN = 3.0  # least gap between two objects' bounding circles, pixels
_ACROSS = 9.0  # most that a related pair is displaced across its relation's axis, pixels


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


def relation_holds(relation: str, a: Any, b: Any) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``; (x, y) centres in pixels, y downwards.

    As in GenEval, the displacement along the relation's axis must exceed 0 and half of the displacement
    across it, so that a diagonal arrangement may satisfy two relations at once.
    """
    dx, dy = float(a[0] - b[0]), float(a[1] - b[1])
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > 0 and along > 0.5 * across


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


def shape_coverage(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Anti-aliased coverage (64, 64) in [0, 1] of one shape; centre and radius in pixels."""
    coverage = np.zeros((SIZE, SIZE))
    reach = radius * EXTENT[shape] + 1.5
    x0, x1 = max(0, int(x - reach)), min(SIZE, int(x + reach) + 2)
    y0, y1 = max(0, int(y - reach)), min(SIZE, int(y + reach) + 2)
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
