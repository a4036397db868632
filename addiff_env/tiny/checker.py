"""The exact checker: reads a picture of the embedded world back into objects and judges a prompt.

Classical vision only, nothing learned: the background is near grey, so chroma segments the objects,
hue names their colours, and the shape is the template with the largest soft overlap (IoU).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from addiff_env.tiny.prompts import COLORS, SHAPES, ObjectSpec, Prompt, parse_caption
from addiff_env.tiny.scenes import EXTENT, SIZE, SIZE_BOUNDARY, relation_holds, shape_coverage

MIN_CHROMA = 0.17  # max - min channel above which a pixel belongs to an object
MIN_AREA = 16.0  # pixels; a smaller blob is a speck, not an object
MIN_IOU = 0.75  # least overlap with the best template for a blob to count as a shape
MIN_MARGIN = 0.03  # least lead over the second-best template: a square with round corners is neither square nor circle
DECISIVE_IOU = 0.95  # above it no other shape fits better: two different templates overlap by less than 2 * 0.95 - 1


@dataclass(frozen=True)
class Found:
    """An object read from a picture; pixels. ``shape`` is ``unknown`` below `MIN_IOU` or `MIN_MARGIN`."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    iou: float

    @property
    def size(self) -> str:
        """``small`` or ``large``, as prompts use the words."""
        return "small" if self.radius < SIZE_BOUNDARY else "large"


@dataclass(frozen=True)
class CheckResult:
    """Whether a picture satisfies a prompt, why not, and the share of requirements it meets."""

    satisfied: bool
    reason: str  # "ok", or the first requirement that failed
    score: float  # in [0, 1]
    objects: tuple[Found, ...]


def read_objects(picture: np.ndarray) -> tuple[Found, ...]:
    """Find the objects of a picture, uint8 (H, W, 3) or float (H, W, 3) in [0, 1], H = W = 64.

    Raises:
        ValueError: wrong shape, wrong range or non-finite values.
    """
    rgb = _as_float(picture)
    r, g, b = np.moveaxis(rgb, -1, 0)  # a reduction over an axis of three would be slow
    chroma = np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)
    colored = chroma > MIN_CHROMA
    hue_class = np.full((SIZE, SIZE), -1)  # -1 is background
    hue_class[colored] = _nearest_color(rgb[colored])
    found = []
    for index, color in enumerate(COLORS):
        if np.count_nonzero(hue_class == index) < MIN_AREA:
            continue
        for window, mask in _blobs(hue_class == index):
            found.append(_describe(mask, chroma[window], window, color))
    return tuple(sorted(found, key=lambda item: (item.x, item.y)))


def check_picture(picture: np.ndarray, prompt: str | Prompt) -> CheckResult:
    """Judge one picture, as `read_objects` takes it, against a prompt or its caption.

    A picture satisfies a prompt when it shows every object asked for, with its attributes and
    relation, and nothing else.

    Raises:
        ValueError: bad picture, or a caption that is not of this world.
    """
    prompt = parse_caption(prompt) if isinstance(prompt, str) else prompt
    objects = read_objects(picture)
    met, reason = _requirements(objects, prompt)
    return CheckResult(all(met), reason, float(np.mean(met)), objects)


def match_objects(objects: Sequence[Found], prompt: str | Prompt) -> list[Found | None]:
    """Which found object stands for each one the prompt asks for, counts written out; None: nothing is left for it.

    Raises:
        ValueError: a caption that is not of this world.
    """
    prompt = parse_caption(prompt) if isinstance(prompt, str) else prompt
    match = _assign(objects, [spec for spec in prompt.objects for _ in range(spec.count)])
    return [None if index is None else objects[index] for index in match]


def _as_float(picture: np.ndarray) -> np.ndarray:
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"expected a picture of shape ({SIZE}, {SIZE}, 3), got {picture.shape}")
    if picture.dtype == np.uint8:
        return picture.astype(np.float64) / 255
    if not np.isfinite(picture).all():
        raise ValueError("picture has non-finite values")
    if picture.min() < -1e-3 or picture.max() > 1 + 1e-3:
        raise ValueError(f"float pictures lie in [0, 1], got [{picture.min():.3g}, {picture.max():.3g}]")
    return picture.astype(np.float64)


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Hue angle in degrees of (..., 3) pixels, from the opponent axes (grey pixels give noise)."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360


@cache
def _palette_hues() -> np.ndarray:
    return _hue(np.asarray(list(COLORS.values())) / 255)  # (8,)


def _nearest_color(rgb: np.ndarray) -> np.ndarray:
    distance = np.abs(_hue(rgb)[..., None] - _palette_hues())
    return np.minimum(distance, 360 - distance).argmin(-1)


def _blobs(pixels: np.ndarray) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Connected regions of at least `MIN_AREA` pixels: their window, a pixel wider, and mask in it."""
    labels, _ = ndimage.label(pixels)
    for blob, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = (slice(max(0, side.start - 1), side.stop + 1) for side in box)
        mask = labels[rows, columns] == blob
        if np.count_nonzero(mask) >= MIN_AREA:
            yield (rows, columns), mask


def _describe(mask: np.ndarray, chroma: np.ndarray, window: tuple[slice, slice], color: str) -> Found:
    """Fit shape templates to one blob, seen through its window, and keep the best."""
    # Soft coverage: an anti-aliased edge pixel has the object's chroma in proportion to its coverage.
    near = ndimage.binary_dilation(mask)
    coverage = np.where(near, np.clip(chroma / np.median(chroma[mask]), 0, 1), 0)
    coverage[coverage < 0.15] = 0
    area = coverage.sum()
    ys, xs = (np.arange(SIZE)[side] + 0.5 for side in window)
    x, y = float((coverage.sum(0) * xs).sum() / area), float((coverage.sum(1) * ys).sum() / area)
    spread = float((coverage * np.add.outer((ys - y) ** 2, (xs - x) ** 2)).sum() / area**2)
    iou, radius, shape, lead = _best_fit(coverage, window, x, y, spread)
    known = iou >= MIN_IOU and lead >= MIN_MARGIN
    return Found(shape if known else "unknown", color, x, y, radius, iou)


def _best_fit(
    coverage: np.ndarray, window: tuple[slice, slice], x: float, y: float, spread: float
) -> tuple[float, float, str, float]:
    """The largest soft IoU over all shapes, with its radius and shape, and its lead over the second largest."""
    best, second = (0.0, 0.0, ""), 0.0
    area = coverage.sum()
    for shape in sorted(SHAPES, key=lambda name: abs(spread - _unit_template(name)[1])):
        radius = float(np.sqrt(area / _unit_template(shape)[0]))
        fit = (*_fit(coverage, window, shape, x, y, radius), shape)
        best, second = (fit, best[0]) if fit > best else (best, max(second, fit[0]))
        # 1 - IoU is a metric, so no other shape can win now; templates cut off by the border may look more alike.
        if best[0] > DECISIVE_IOU and 1.5 * radius < min(x, y, SIZE - x, SIZE - y):
            break
    return (*best, best[0] - second)


@cache
def _unit_template(shape: str) -> tuple[float, float]:
    """Area at radius 1, and spread: the second moment about the centroid over the squared area."""
    template = shape_coverage(shape, SIZE / 2, SIZE / 2, 16.0)
    axis = (np.arange(SIZE) + 0.5 - SIZE / 2) ** 2
    area = float(template.sum())
    return area / 16.0**2, float((template * np.add.outer(axis, axis)).sum() / area**2)


def _fit(
    coverage: np.ndarray, window: tuple[slice, slice], shape: str, x: float, y: float, radius: float
) -> tuple[float, float]:
    """Soft IoU of ``coverage`` with the shape of the same area and centroid, and its radius."""
    if radius * EXTENT[shape] > SIZE:
        return 0.0, radius
    template = shape_coverage(shape, x, y, radius)
    overlap = np.minimum(coverage, template[window]).sum()  # outside the window, coverage is 0
    return float(overlap / (coverage.sum() + template.sum() - overlap)), radius


# --------------------------------------------------------------------------- judging


def _requirements(objects: Sequence[Found], prompt: Prompt) -> tuple[list[bool], str]:
    """Every requirement's outcome, and the first failure in words."""
    wanted = [spec for spec in prompt.objects for _ in range(spec.count)]
    match = _assign(objects, wanted)
    outcomes: list[tuple[bool, str]] = []
    for spec, index in zip(wanted, match, strict=True):
        outcomes += _object_outcomes(spec, None if index is None else objects[index])
    if prompt.relation:
        pair = [None if i is None else objects[i] for i in match[:2]]
        a, b = pair
        holds = a is not None and b is not None and relation_holds(prompt.relation, (a.x, a.y), (b.x, b.y))
        outcomes.append((holds, f"first object not {prompt.relation} second"))
    extra = len(objects) - sum(index is not None for index in match)
    outcomes.append((extra == 0, f"{extra} object(s) too many: {_tally(objects)}"))
    reason = next((why for ok, why in outcomes if not ok), "ok")
    return [ok for ok, _ in outcomes], reason


def _object_outcomes(spec: ObjectSpec, found: Found | None) -> list[tuple[bool, str]]:
    name = ObjectSpec(spec.shape, spec.color, spec.size).phrase()
    if found is None:
        num_requirements = 1 + (spec.color is not None) + (spec.size is not None)
        return [(False, f"{name} is missing")] * num_requirements
    outcomes = [(found.shape == spec.shape, f"{name} looks like {found.color} {found.shape}")]
    if spec.color is not None:
        outcomes.append((found.color == spec.color, f"{name} is {found.color}"))
    if spec.size is not None:
        outcomes.append((found.size == spec.size, f"{name} is {found.size}"))
    return outcomes


def _assign(objects: Sequence[Found], wanted: Sequence[ObjectSpec]) -> list[int | None]:
    """Which found object stands for which wanted one: the assignment that meets the most requirements."""
    gain = np.zeros((len(wanted), len(objects)))
    for row, spec in enumerate(wanted):
        for column, found in enumerate(objects):
            gain[row, column] = 0.5 + sum(ok for ok, _ in _object_outcomes(spec, found))
    match: list[int | None] = [None] * len(wanted)
    for row, column in zip(*linear_sum_assignment(gain, maximize=True), strict=True):
        match[row] = int(column)
    return match


def _tally(objects: Sequence[Found]) -> str:
    counts = Counter(f"{item.color} {item.shape}" for item in objects)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
