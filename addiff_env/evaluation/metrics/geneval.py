"""GenEval (Ghosh, Hajishirzi & Schmidt 2023): does a picture hold the objects, counts, colours and places asked for?

The scoring rules are those of the benchmark's own script, as pure functions over detections. Detection and colour
classification are passed in: by the models of `detectors`, and by `ClipColors`. Results do not compare with published
ones: the default detector is the script's architecture (Mask2Former, Swin-S, COCO instances) with other weights and
another input size, others are further away. Rows and tables should name the detector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.base import category_means
from addiff_env.evaluation.metrics.detectors import (
    MASK2FORMER,
    SETTING,
    BoxDetector,
    Detection,
    Detector,
    InstanceDetector,
)
from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.weights import check_tokenizer, fetching, load_network, quiet_loading

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLIP = "openai/clip-vit-large-patch14"  # the script's
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class GenEvalRules:
    """Thresholds, by default those of the benchmark's script."""

    threshold: float = 0.3  # detections count above this confidence ...
    counting_threshold: float = 0.9  # ... and in counting prompts above this one
    max_objects: int = 16  # most confident ones kept of each class
    max_overlap: float = 1.0  # boxes of a class that overlap more (IoU) are one object; 1: never
    position_threshold: float = 0.1  # offset discounted, as a share of the two objects' summed extents


@dataclass(frozen=True)
class GenEvalVerdict:
    """Whether a picture satisfies its prompt, and in words why not."""

    correct: bool
    reason: str = ""


ColorClassifier = Callable[[Sequence[Detection]], Sequence[str]]  # of one picture's objects of one class
Groups = Mapping[str, Sequence[Detection]]  # kept detections by label, most confident first


def keep_detections(
    detections: Iterable[Detection],
    tag: str,
    rules: GenEvalRules = GenEvalRules(),  # noqa: B008 (frozen)
) -> dict[str, list[Detection]]:
    """Detections that count, by label, most confident first; labels without any are absent.

    Strictly above the confidence threshold (that of counting where ``tag`` is ``counting``), at most ``max_objects`` of
    a label, and then without those that overlap a more confident one.
    """
    threshold = rules.counting_threshold if tag == "counting" else rules.threshold
    by_label: dict[str, list[Detection]] = {}
    for detection in detections:
        by_label.setdefault(detection.label, []).append(detection)
    kept = {}
    for label, group in by_label.items():
        ranked = sorted(group, key=lambda found: found.score)[::-1]  # of equals the later one first, as in the script
        confident = [found for found in ranked if found.score > threshold][: rules.max_objects]
        if confident:
            kept[label] = _without_overlaps(confident, rules.max_overlap)
    return kept


def _without_overlaps(ranked: Sequence[Detection], limit: float) -> list[Detection]:
    if limit >= 1:
        return list(ranked)
    kept: list[Detection] = []
    for found in ranked:
        if all(box_overlap(found.box, other.box) < limit for other in kept):
            kept.append(found)
    return kept


def box_overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes whose right and bottom pixels belong to them; 0.0 where both are empty."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def relative_position(a: Detection, b: Detection, threshold: float = 0.1) -> set[str]:
    """Where ``a`` lies as seen from ``b``: none, one or two of `RELATIONS`.

    The offset of the centres is shortened along each axis by ``threshold`` times the summed extents; a relation holds
    where what remains is more than half of the offset's length.
    """
    box_a, box_b = np.asarray(a.box, float), np.asarray(b.box, float)
    offset = (box_a[:2] + box_a[2:] - box_b[:2] - box_b[2:]) / 2
    extents = np.abs(box_a[2:] - box_a[:2]) + np.abs(box_b[2:] - box_b[:2])
    remaining = np.sign(offset) * np.maximum(np.abs(offset) - threshold * extents, 0)
    if np.all(np.abs(remaining) < 1e-3):
        return set()
    right, down = remaining / np.linalg.norm(offset)
    holds = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {relation for relation, true in holds.items() if true}


# --------------------------------------------------------------------------- one picture


def judge_picture(
    detections: Iterable[Detection],
    metadata: Mapping[str, Any],
    classify_colors: ColorClassifier | None = None,
    rules: GenEvalRules = GenEvalRules(),  # noqa: B008 (frozen)
) -> GenEvalVerdict:
    """Judge a picture by what was detected in it.

    Every clause of ``include`` must hold: so many objects of a class, that many of them in a colour, each of them in a
    relation to each object of an earlier clause. Colour and place are asked of the most confident ones, as many as
    wanted. No clause of ``exclude`` may hold: so many objects of a class or more.

    Args:
        detections: whatever was found, unfiltered.
        metadata: a line of GenEval's list: ``tag``, ``include`` and, if there, ``exclude``.
        classify_colors: names a colour for each of some detections; needed where a clause asks for one.
        rules: thresholds.

    Raises:
        ValueError: a colour is asked for without a classifier, a relation is unknown, or it names no earlier clause.
    """
    found = keep_detections(detections, metadata["tag"], rules)
    complaints: list[str] = []
    matched: list[Sequence[Detection] | None] = []  # what each clause was satisfied by
    for clause in metadata.get("include", ()):
        objects, complaint = _match(clause, found, matched, classify_colors, rules)
        matched.append(None if complaint else objects)
        complaints += [complaint] if complaint else []
    for clause in metadata.get("exclude", ()):
        number = len(found.get(clause["class"], ()))
        if number >= clause["count"]:
            complaints.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return GenEvalVerdict(not complaints, "; ".join(complaints))


def _match(
    clause: Mapping[str, Any],
    found: Groups,
    matched: Sequence[Sequence[Detection] | None],
    classify_colors: ColorClassifier | None,
    rules: GenEvalRules,
) -> tuple[Sequence[Detection], str]:
    """The objects that a clause speaks of, and what is wrong with them."""
    label, count = clause["class"], clause["count"]
    objects = list(found.get(label, ()))[:count]
    if len(objects) < count:
        return objects, f"expected {label}>={count}, found {len(objects)}"
    complaint = _wrong_color(clause, objects, classify_colors) if "color" in clause else ""
    if not complaint and "position" in clause:
        complaint = _wrong_place(clause, objects, matched, rules.position_threshold)
    return objects, complaint


def _wrong_color(
    clause: Mapping[str, Any], objects: Sequence[Detection], classify_colors: ColorClassifier | None
) -> str:
    if classify_colors is None:
        raise ValueError(f"the clause {dict(clause)} asks for a colour, but there is no colour classifier")
    colors, wanted = list(classify_colors(objects)), clause["color"]
    if len(colors) != len(objects):
        raise ValueError(f"the colour classifier named {len(colors)} colours for {len(objects)} objects")
    if colors.count(wanted) >= clause["count"]:
        return ""
    return f"expected {wanted} {clause['class']}>={clause['count']}, found {', '.join(colors)}"


def _wrong_place(
    clause: Mapping[str, Any],
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    threshold: float,
) -> str:
    relation, target = clause["position"]
    if relation not in RELATIONS or not 0 <= target < len(matched):
        raise ValueError(f"expected a relation of {RELATIONS} to an earlier clause, got {clause['position']}")
    others = matched[target]
    if others is None:
        return f"no target for {clause['class']} to be {relation}"
    for one in objects:
        for other in others:
            holds = relative_position(one, other, threshold)
            if relation not in holds:
                position = " and ".join(sorted(holds)) or "neither side of"
                return f"expected {clause['class']} {relation} target, found {position} target"
    return ""


# --------------------------------------------------------------------------- a run


def summarize(results: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of correct pictures per tag, and under ``overall`` the mean over tags, GenEval's headline number.

    Args:
        results: (tag, 0 or 1) of every picture.

    Raises:
        ValueError: no results.
    """
    shares = category_means(results)
    if not shares:
        raise ValueError("no GenEval results to summarize")
    return {**shares, "overall": float(np.mean(list(shares.values())))}


class ClipColors:
    """Zero-shot colours by CLIP: an object's crop, its surroundings greyed out by the mask, against named colours.

    Args:
        model: hub id or folder; the default is the script's CLIP.
        device: where it runs.
    """

    TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
    GREY = (0x99, 0x99, 0x99)

    def __init__(self, model: str = CLIP, device: str = "cpu") -> None:
        from transformers import AutoProcessor, CLIPModel

        self.name, self.device = model, device
        with fetching(model, f"{SETTING},colors=<folder>") as folder, quiet_loading():
            self.processor = AutoProcessor.from_pretrained(folder)
            check_tokenizer(self.processor.tokenizer, folder)
            self.model = load_network(CLIPModel, folder).eval().to(device)
        self._classes: dict[str, Any] = {}

    def of(self, picture: Image.Image) -> ColorClassifier:
        """The classifier of one picture's objects, as `judge_picture` takes it."""
        return lambda objects: self._classify(picture, objects)

    @frozen_call
    def _classify(self, picture: Image.Image, objects: Sequence[Detection]) -> list[str]:
        import torch

        crops = [object_crop(picture, found, self.GREY) for found in objects]
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            features = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
            scores = _unit(features) @ self._class_features(objects[0].label).T  # (N, colours)
        return [COLORS[index] for index in scores.argmax(1).tolist()]

    def _class_features(self, label: str) -> Any:
        """Unit text features (colours, C): each colour's templates averaged, then normalised again."""
        if label not in self._classes:
            import torch

            texts = [t.format(color=color, label=label) for color in COLORS for t in self.TEMPLATES]
            tokens = self.processor(text=texts, padding="max_length", truncation=True, return_tensors="pt").to(
                self.device
            )
            with torch.inference_mode():
                encoded = self.model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"])
                features = _unit(self.model.text_projection(encoded.pooler_output))
            self._classes[label] = _unit(features.reshape(len(COLORS), len(self.TEMPLATES), -1).mean(1))
        return self._classes[label]


def _unit(features: Any) -> Any:
    return features / features.norm(dim=-1, keepdim=True)


def object_crop(picture: Image.Image, found: Detection, background: tuple[int, int, int]) -> Image.Image:
    """The object's box, with what its mask leaves out painted over.

    Raises:
        ValueError: a mask of another size than the picture.
    """
    shown = picture.convert("RGB")
    if found.mask is not None:
        if found.mask.shape != (picture.height, picture.width):
            raise ValueError(f"a mask of {found.mask.shape} for a picture of {(picture.height, picture.width)}")
        blank = Image.new("RGB", picture.size, background)
        shown = Image.composite(shown, blank, Image.fromarray(found.mask.astype(np.uint8) * 255))
    left, top, right, bottom = (int(round(edge)) for edge in found.box)
    return shown.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


# --------------------------------------------------------------------------- the metric


class GenEval:
    """``geneval``: whether a picture satisfies GenEval's metadata (0 or 1), with the reason where it does not.

    Args:
        detector: finds the objects.
        colors: names their colours.
    """

    name = "geneval"

    def __init__(self, detector: Detector, colors: ClipColors) -> None:
        self.detector, self.colors = detector, colors

    def columns(self, item: Item) -> tuple[str, ...]:
        """``geneval`` of items with GenEval's metadata."""
        return ("geneval",) if {"tag", "include"} <= set(item.metadata) else ()

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> list[tuple[dict[str, float], str]]:
        """Verdicts on pictures, uint8 (B, H, W, 3)."""
        results = [self._judge(picture, item) for picture, item in zip(pictures, items, strict=True)]
        return [({"geneval": float(v.correct)}, v.reason) for v in results]

    def _judge(self, picture: np.ndarray, item: Item) -> GenEvalVerdict:
        shown = Image.fromarray(picture)
        return judge_picture(self.detector(shown), item.metadata, self.colors.of(shown))


def open_geneval(rest: str, device: str) -> GenEval:
    """The metric with its models: ``[<detector>][,colors=<CLIP>]``, hub ids or folders.

    A detector without masks (DETR) is told from one with masks (Mask2Former, as the script's) by its configuration.

    Raises:
        FileNotFoundError: a model is not there. ValueError: an unknown option, or a detector without COCO's classes.
    """
    from transformers import AutoConfig

    model, colors = read_models(rest)
    with fetching(model, SETTING) as folder:
        masks = AutoConfig.from_pretrained(folder).model_type == "mask2former"
    detector: Detector = InstanceDetector(model, device) if masks else BoxDetector(model, device)
    return GenEval(detector, ClipColors(colors, device))


def read_models(rest: str) -> tuple[str, str]:
    """The detector and the CLIP that the setting of the metric names, or their defaults; raises as `open_geneval`."""
    parts = [part for part in rest.split(",") if part]
    model = parts.pop(0) if parts and "=" not in parts[0] else MASK2FORMER
    options = dict(part.partition("=")[::2] for part in parts)
    if set(options) - {"colors"}:
        raise ValueError(f"cannot read {rest!r} of 'geneval'; known options: colors")
    return model, options.get("colors", CLIP)
