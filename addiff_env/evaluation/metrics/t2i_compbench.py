"""T2I-CompBench's metrics (Huang et al. 2023, 2025): BLIP-VQA, detector-based spatial, depth, numeracy, CLIP, 3-in-1.

The scoring rules (`t2i_rules`) are those of the benchmark's own scripts, as pure functions over detections. Different
from them are: noun phrases, and the adjectives that CLIP's prompt of 3-in-1 is freed from, come from `phrases` instead
of spaCy (the adjectives from a list made for ``complex_val.txt``); what a prompt counts is found by rules, where the
script has a vocabulary; the detector is one of the `transformers` library instead of UniDet; BLIP and the depth
estimator are the `transformers` ports; depths are read at the objects' boxes, where the script mixes up rows and
columns. Tables should name the models, and numbers made with others than the scripts' are not comparable with
published ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from addiff_env.env.prompts import load_prompts
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.base import as_tensor
from addiff_env.evaluation.metrics.detectors import DETECTOR, BoxDetector, Detection, Finder, WordDetector
from addiff_env.evaluation.metrics.phrases import is_quality, without
from addiff_env.evaluation.metrics.t2i_rules import (
    COMPLEX_RELATIONS,
    SIDE,
    complex_demand,
    depth_demand,
    depth_score,
    numeracy_demand,
    numeracy_score,
    objects_of,
    questions,
    spatial_demand,
    spatial_score,
)
from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.paths import resolve_model
from addiff_env.loading.weights import check_tokenizer, fetching, load_network, quiet_loading
from addiff_env.perception.scorers import Scorer, load_scorer

T2I_METRICS = ("blip_vqa", "spatial", "spatial_3d", "numeracy", "non_spatial", "three_in_one", "t2i_compbench")
OWN = {  # each category's own metric, as the benchmark has it
    **dict.fromkeys(("color", "shape", "texture"), "blip_vqa"),
    "spatial": "spatial",
    "3d_spatial": "spatial_3d",
    "numeracy": "numeracy",
    "non_spatial": "non_spatial",
    "complex": "three_in_one",
}
BLIP = "Salesforce/blip-vqa-capfilt-large"
DEPTH = "Intel/dpt-hybrid-midas"  # the script's in its transformers port
# DPT's coarsest fusion has nothing to add to yet: published weights lack the layers that would.
_DPT_UNUSED = r"^neck\.fusion_stage\.layers\.0\.residual_layer1\."
CLIP = "clipscore:open_clip:ViT-B-32/openai"


# --------------------------------------------------------------------------- models


class BlipVqa:
    """How surely BLIP sees every noun phrase of the prompt: the product of P(yes) / (P(yes) + P(no)) over questions.

    Args:
        model: hub id or folder of a `BlipForQuestionAnswering`.
        device: where it runs.

    Raises:
        FileNotFoundError: it is not there. ValueError: its vocabulary lacks *yes* or *no*.
    """

    def __init__(self, model: str = BLIP, device: str = "cpu") -> None:
        from transformers import BlipForQuestionAnswering, BlipProcessor

        self.name, self.device = model, device
        with fetching(model, "blip_vqa:<folder>") as folder, quiet_loading():
            self.processor = BlipProcessor.from_pretrained(folder)
            check_tokenizer(self.processor.tokenizer, folder)
            self.model = load_network(BlipForQuestionAnswering, folder).eval().to(device)
        tokenizer = self.processor.tokenizer
        self.answers = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
        if tokenizer.unk_token_id in self.answers:
            raise ValueError(f"{model!r} knows no token for 'yes' and 'no'")

    def __call__(self, picture: Image.Image, prompt: str) -> float:
        """The picture's score; 1 where the prompt has no noun phrase, as in the script."""
        asked = questions(prompt)
        return float(np.prod(self.probabilities(picture, asked))) if asked else 1.0

    @frozen_call
    def probabilities(self, picture: Image.Image, asked: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) of each question, from the decoder's first token.

        Questions are asked one by one: `transformers` lets the padding of a shorter one change its answer.
        """
        pixels = self.processor.image_processor(picture.convert("RGB"), return_tensors="pt").pixel_values
        features = self.model.vision_model(pixels.to(self.device)).last_hidden_state  # (1, patches, width)
        return [self._probability(features, question) for question in asked]

    def _probability(self, features: torch.Tensor, question: str) -> float:
        text = self.processor.tokenizer(question, truncation=True, max_length=35, return_tensors="pt").to(self.device)
        config = self.model.config.text_config
        if config.bos_token_id + 1 < config.vocab_size:
            text.input_ids[:, 0] = config.bos_token_id + 1  # BLIP's encoder token, as in the official code
        read = self.model.text_encoder(
            input_ids=text.input_ids, attention_mask=text.attention_mask, encoder_hidden_states=features
        ).last_hidden_state
        begin = torch.tensor([[config.bos_token_id]], device=self.device)
        logits = self.model.text_decoder(input_ids=begin, encoder_hidden_states=read).logits[0, 0]
        return float(logits[self.answers].float().softmax(0)[0])


class DepthEstimator:
    """How near everything in a picture is, by a DPT or Depth Anything of the `transformers` library.

    Args:
        model: hub id or folder of one that predicts relative (inverse) depth.
        device: where it runs.

    Raises:
        FileNotFoundError: it is not there. ValueError: a model of another kind, or one that predicts distances.
    """

    def __init__(self, model: str = DEPTH, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForDepthEstimation

        self.name, self.device = model, device
        with fetching(model, "spatial_3d:depth=<folder>") as folder, quiet_loading():
            config = AutoConfig.from_pretrained(folder)
            is_metric = getattr(config, "depth_estimation_type", "relative") != "relative"
            if config.model_type not in ("dpt", "depth_anything") or is_metric:
                raise ValueError(f"{model!r} ({config.model_type}) is no DPT or Depth Anything of relative depth")
            self.processor = AutoImageProcessor.from_pretrained(folder)
            loaded = load_network(AutoModelForDepthEstimation, folder, may_lack=_DPT_UNUSED)
        self.model = loaded.eval().to(device)

    @frozen_call
    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Nearness (h, w) in [0, 1], the nearest being 1, at the size of `detect`'s boxes."""
        inputs = self.processor(images=picture.convert("RGB"), return_tensors="pt").to(self.device)
        near = self.model(**inputs).predicted_depth.float()  # (1, h, w)
        scale = SIDE / min(picture.size)
        size = (round(scale * picture.height), round(scale * picture.width))
        near = torch.nn.functional.interpolate(near[None], size, mode="bilinear", align_corners=True)[0, 0]
        spread = near.max() - near.min()
        return ((near - near.min()) / spread.clamp_min(1e-12)).cpu().numpy()


def detect(detector: Finder, picture: np.ndarray, words: Sequence[str], threshold: float) -> list[Detection]:
    """Detections above a confidence, boxes in pixels of a picture whose shorter side is `SIDE`."""
    scale = SIDE / min(picture.shape[:2])
    found = [one for one in detector(Image.fromarray(picture), words) if one.score > threshold]
    boxes = [
        (scale * left, scale * top, scale * right, scale * low) for left, top, right, low in (f.box for f in found)
    ]
    return [replace(one, box=box) for one, box in zip(found, boxes, strict=True)]


# --------------------------------------------------------------------------- metrics


class T2IMetric:
    """One of `T2I_METRICS`; it applies to the categories that it is for.

    Args:
        name: ``t2i_compbench`` gives each category's own score under both names.
        blip: a picture's and a prompt's BLIP-VQA score.
        detector: finds the objects of a picture's own prompt.
        threshold: detections count above this confidence.
        depth: how near everything in a picture is.
        clip: cosine of pictures and prompts.
        lists: prompts (lower case, without full stop) that have a spatial relation only, or an action only.
        device: where the CLIP is.
    """

    def __init__(
        self,
        name: str,
        blip: BlipVqa | None = None,
        detector: Finder | None = None,
        threshold: float = 0.5,
        depth: Callable[[Image.Image], np.ndarray] | None = None,
        clip: Scorer | None = None,
        lists: tuple[frozenset[str], frozenset[str]] | None = None,
        device: str = "cpu",
    ) -> None:
        self.name, self.blip, self.detector, self.threshold = name, blip, detector, threshold
        self.depth, self.clip, self.lists, self.device = depth, clip, lists, device

    def columns(self, item: Item) -> tuple[str, ...]:
        """The category's own metric, if it is this one or this is all of them."""
        own = OWN.get(item.category)
        if own is None or self.name not in (own, "t2i_compbench"):
            return ()
        return (own,) if self.name == own else (own, self.name)

    def score(self, pictures: np.ndarray, items: Sequence[Item]) -> list[tuple[dict[str, float], str]]:
        """Scores in [0, 1] (CLIP's cosines in [-1, 1]), without words."""
        values = [self._own(picture, item) for picture, item in zip(pictures, items, strict=True)]
        return [(dict.fromkeys(self.columns(item), value), "") for value, item in zip(values, items, strict=True)]

    def _own(self, picture: np.ndarray, item: Item) -> float:
        own = OWN[item.category]
        if own == "blip_vqa":
            return self._attributes(picture, item.prompt)
        if own == "numeracy":
            return numeracy_score(self._detect(picture, item), numeracy_demand(item.prompt))
        if own == "spatial":
            return spatial_score(self._detect(picture, item), *spatial_demand(item.prompt))
        if own == "spatial_3d":
            return depth_score(self._detect(picture, item), *depth_demand(item.prompt), self._nearness(picture))
        if own == "non_spatial":
            return self._cosine(picture, item.prompt)
        return self._complex(picture, item)

    def _complex(self, picture: np.ndarray, item: Item) -> float:
        """The mean of attributes and whichever relations the prompt has (Huang et al. 2023, 3-in-1)."""
        spatial, action = self._relations(item)
        parts = [self._attributes(picture, item.prompt)]
        if spatial:
            parts.append(spatial_score(self._detect(picture, item), *complex_demand(item.prompt)))
        if action:
            parts.append(self._cosine(picture, without(item.prompt, is_quality)))
        return float(np.mean(parts))

    def _relations(self, item: Item) -> tuple[bool, bool]:
        """Whether the prompt has a spatial relation, and an action; by the benchmark's lists, else by its words.

        With the lists a prompt on neither has both; without them one that names a place has a spatial relation, and
        any other an action.
        """
        prompt, stated = item.prompt, item.metadata.get("relations")
        if self.lists is None and stated:
            return stated != "action", stated != "spatial"
        if self.lists is None:
            spatial = any(words in prompt.lower() for words in COMPLEX_RELATIONS)
            return spatial, not spatial
        text = prompt.split(".")[0].lower()
        spatial_only, action_only = (text in part for part in self.lists)
        return not (action_only and not spatial_only), not spatial_only

    def _attributes(self, picture: np.ndarray, prompt: str) -> float:
        assert self.blip is not None
        return self.blip(Image.fromarray(picture), prompt)

    def _detect(self, picture: np.ndarray, item: Item) -> list[Detection]:
        assert self.detector is not None
        return detect(self.detector, picture, objects_of(item), self.threshold)

    def _nearness(self, picture: np.ndarray) -> np.ndarray:
        assert self.depth is not None
        return self.depth(Image.fromarray(picture))

    def _cosine(self, picture: np.ndarray, prompt: str) -> float:
        assert self.clip is not None
        return float(self.clip.score(as_tensor(picture[None], self.device), [prompt])[0])


def open_t2i(name: str, rest: str, device: str, items: Sequence[Item]) -> T2IMetric:
    """One of `T2I_METRICS` with its models.

    Args:
        name: of the metric.
        rest: the model of a metric that has one, or ``blip=``, ``detector=``, ``depth=``, ``clip=``, ``threshold=``,
            ``lists=`` (a folder with ``complex_val_spatial.txt`` and ``complex_val_action.txt``; by default what the
            loader found beside the prompts), separated by commas.
        device: where the models run.
        items: whose categories say which models are needed.

    Raises:
        FileNotFoundError: weights or lists are missing. ValueError: an unknown option.

    Warns:
        UserWarning: nothing says which relations the complex prompts have, so that they get no official mean; or the
            detector has classes of its own, among which there are objects missing that prompts ask for: it cannot find
            these, so that they count as absent from every picture, as in the scripts.
    """
    options, models = _read_options(name, rest), read_models(name, rest)
    categories = {item.category for item in items}
    needed = {own for category, own in OWN.items() if category in categories and name in (own, "t2i_compbench")}
    parts: dict[str, Any] = {}
    if needed & {"blip_vqa", "three_in_one"}:
        parts["blip"] = BlipVqa(models["blip"], device)
    if needed & {"spatial", "spatial_3d", "numeracy", "three_in_one"}:
        parts |= _open_detector(models["detector"], options, device)
        if labels := getattr(parts["detector"], "labels", None):
            _warn_of_unknown(items, labels.values(), models["detector"])
    if "spatial_3d" in needed:
        parts["depth"] = DepthEstimator(models["depth"], device)
    if needed & {"non_spatial", "three_in_one"}:
        parts["clip"] = load_scorer(models["clip"], device)
    if "lists" in options:
        parts["lists"] = _read_lists(Path(resolve_model(options["lists"])))
    elif "three_in_one" in needed:
        _warn_of_guesses(items)
    return T2IMetric(name, **parts, device=device)


def _warn_of_guesses(items: Sequence[Item]) -> None:
    guessed = [item.prompt for item in items if item.category == "complex" and "relations" not in item.metadata]
    if guessed:
        warnings.warn(
            f"nothing says which relations {len(guessed)} pictures of category 'complex' have, so their words decide "
            "and none gets the official mean of three parts; put the benchmark's complex_val_spatial.txt and "
            "complex_val_action.txt beside complex_val.txt, or name their folder by lists=",
            stacklevel=3,
        )


def _warn_of_unknown(items: Sequence[Item], labels: Collection[str], detector: str) -> None:
    """As `spatial_score` and `numeracy_score` match labels: whole, or as a part of one."""
    wanted = {(name, item.category == "numeracy") for item in items for name in objects_of(item)}
    unknown = sorted(
        {name for name, part in wanted if not any(name in label if part else name == label for label in labels)}
    )
    if unknown:
        warnings.warn(
            f"{detector} knows {len(labels)} classes, not {len(unknown)} of the {len({n for n, _ in wanted})} objects "
            f"that prompts ask for (e.g. {', '.join(unknown[:5])}): these count as absent from every picture; a "
            "detector that can be asked for any word (OWL-ViT, OWLv2) finds them",
            stacklevel=3,
        )


_MODEL = {**dict.fromkeys(("spatial", "spatial_3d", "numeracy"), "detector"), "blip_vqa": "blip", "non_spatial": "clip"}
_DEFAULTS = {"blip": BLIP, "detector": DETECTOR, "depth": DEPTH, "clip": CLIP}
_OPTIONS = ("blip", "detector", "depth", "clip", "threshold", "lists")


def _read_options(name: str, rest: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for number, part in enumerate(filter(None, rest.split(","))):
        key, equals, value = part.partition("=")
        if not equals and number == 0 and name in _MODEL:
            key, value = _MODEL[name], part
        if key not in _OPTIONS or not value:
            raise ValueError(f"cannot read {part!r} in {name}:{rest}; known options: {', '.join(_OPTIONS)}")
        options[key] = value
    return options


def read_models(name: str, rest: str) -> dict[str, str]:
    """Every model that the setting of a metric names, or its default; raises ValueError for an unknown option."""
    options = _read_options(name, rest)
    return {part: options.get(part, default) for part, default in _DEFAULTS.items()}


def _open_detector(model: str, options: Mapping[str, str], device: str) -> dict[str, Any]:
    from transformers import AutoConfig

    with fetching(model, "spatial:<folder>") as folder:
        asked = AutoConfig.from_pretrained(folder).model_type in ("owlvit", "owlv2")
    detector: Finder = WordDetector(model, device) if asked else _Unasked(BoxDetector(model, device, coco=False))
    threshold = float(options.get("threshold", 0.2 if asked else 0.5))
    return {"detector": detector, "threshold": threshold}


class _Unasked:
    """A detector of fixed classes, which cannot be asked for words."""

    def __init__(self, detector: BoxDetector) -> None:
        self.detector, self.labels = detector, detector.labels

    def __call__(self, picture: Image.Image, words: Sequence[str]) -> list[Detection]:
        return self.detector(picture)


def _read_lists(folder: Path) -> tuple[frozenset[str], frozenset[str]]:
    spatial, action = (
        frozenset(prompt.split(".")[0].lower() for prompt in load_prompts(folder / f"complex_val_{kind}.txt"))
        for kind in ("spatial", "action")
    )
    return spatial, action
