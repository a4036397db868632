"""Detectors of objects, of the `transformers` library: what GenEval's and T2I-CompBench's rules are applied to.

They are loaded when first used. Rows and tables should name the detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.weights import check_tokenizer, fetching, load_network, quiet_loading

DETECTOR = "google/owlv2-base-patch16-ensemble"  # any word may be asked of it; COCO's 80 classes lack half the objects
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"  # of the script's architecture
SETTING = "geneval:<folder of a detector>"
# GenEval's names for COCO classes that it renamed, or that checkpoints call otherwise: Mask2Former's and RT-DETR's have
# Pascal VOC's names for six of them.
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
    "cellphone": "cell phone",
}


@dataclass(frozen=True)
class Detection:
    """One object found."""

    label: str  # in GenEval's vocabulary
    score: float  # confidence in [0, 1]
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    mask: np.ndarray | None = None  # bool (H, W)


class Detector(Protocol):
    """Finds objects in pictures."""

    name: str

    def __call__(self, picture: Image.Image) -> list[Detection]:
        """All detections, however unsure."""


class InstanceDetector:
    """A Mask2Former of the `transformers` library with COCO instance classes: boxes and masks.

    The default has the architecture of the script's detector, but other weights than its checkpoint (of mmdet) and
    another input size, so that its numbers do not compare with published ones. As in the script there are as many
    detections as queries, masks are cut out at the picture's size, a score is that of the class times the mask's mean
    probability, and a box encloses its mask, with right and bottom one pixel behind it.

    Args:
        model: hub id or folder.
        device: where it runs.

    Raises:
        ValueError: the model does not know a class of `GENEVAL_CLASSES`.
    """

    def __init__(self, model: str = MASK2FORMER, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.name, self.device = model, device
        with fetching(model, SETTING) as folder, quiet_loading():
            self.processor = AutoImageProcessor.from_pretrained(folder)
            self.model = load_network(Mask2FormerForUniversalSegmentation, folder).eval().to(device)
        self.labels = vocabulary(self.model.config.id2label)

    @frozen_call
    def __call__(self, picture: Image.Image) -> list[Detection]:
        """Detections of one picture, most confident first."""
        import torch

        inputs = self.processor(images=picture.convert("RGB"), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
            chances = outputs.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes); the last one is "none"
            best = chances.flatten().topk(len(chances))
            found = []
            for chance, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                query, label = divmod(place, chances.shape[1])
                logits = _enlarge(outputs.masks_queries_logits[0, query], (picture.height, picture.width))
                mask = logits > 0
                certainty = logits[mask].sigmoid().mean().item()
                found.append(_from_mask(self.labels.get(label), chance * certainty, mask.cpu().numpy()))
        return sorted((f for f in found if f is not None), key=lambda f: -f.score)


def _enlarge(logits: Any, size: tuple[int, int]) -> Any:
    """A mask's logits (h, w) at a size (H, W).

    The processor's own `post_process_instance_segmentation` cuts masks out at 384x384, whatever the picture's size.
    """
    import torch

    return torch.nn.functional.interpolate(logits[None, None], size, mode="bilinear", align_corners=False)[0, 0]


def _from_mask(label: str | None, score: float, mask: np.ndarray) -> Detection | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if label is None or not rows.size:
        return None
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Detection(label, float(score), box, mask)


class BoxDetector:
    """A DETR-like detector of the `transformers` library: boxes without masks.

    Args:
        model: hub id or folder.
        device: where it runs.
        coco: whether it must know GenEval's classes, and gives these alone, under GenEval's names; else all it knows.

    Raises:
        ValueError: the model does not know a class of `GENEVAL_CLASSES`. FileNotFoundError: it is not there.
    """

    def __init__(self, model: str = "facebook/detr-resnet-50", device: str = "cpu", coco: bool = True) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.name, self.device = model, device
        with fetching(model, SETTING) as folder, quiet_loading():
            self.processor = AutoImageProcessor.from_pretrained(folder)
            self.model = load_network(AutoModelForObjectDetection, folder).eval().to(device)
        names = self.model.config.id2label
        self.labels = vocabulary(names) if coco else dict(names)

    @frozen_call
    def __call__(self, picture: Image.Image) -> list[Detection]:
        """Detections of one picture, most confident first."""
        import torch

        inputs = self.processor(images=picture.convert("RGB"), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        (result,) = self.processor.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=[(picture.height, picture.width)]
        )
        return _detections(result, self.labels)


def _detections(result: Mapping[str, Any], labels: Mapping[int, str]) -> list[Detection]:
    """What a processor found of ``labels``, most confident first."""
    parts = (result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist())
    known = [(labels.get(label), score, box) for label, score, box in zip(*parts, strict=True)]
    found = [Detection(label, score, (b[0], b[1], b[2], b[3])) for label, score, b in known if label]
    return sorted(found, key=lambda f: -f.score)


def vocabulary(id2label: Mapping[int, str]) -> dict[int, str]:
    """GenEval's name of each of a model's classes that it knows.

    Raises:
        ValueError: classes of GenEval's that the model does not have.
    """
    names = {index: ALIASES.get(label, label) for index, label in id2label.items()}
    absent = sorted(set(GENEVAL_CLASSES) - set(names.values()))
    if absent:
        raise ValueError(f"the detector does not know {len(absent)} of GenEval's classes: {absent[:8]}")
    return {index: name for index, name in names.items() if name in GENEVAL_CLASSES}


GENEVAL_CLASSES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,"
    "oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)


class Finder(Protocol):
    """Finds objects in pictures."""

    def __call__(self, picture: Image.Image, words: Sequence[str]) -> list[Detection]:
        """Detections, most confident first: of ``words``, or of whatever it knows."""


class WordDetector:
    """A detector that is asked for words, of the `transformers` library (OWL-ViT, OWLv2): boxes without masks.

    Every box goes to the one word that fits it best, so what is found depends on the words that are asked for.

    Args:
        model: hub id or folder.
        device: where it runs.

    Raises:
        FileNotFoundError: the model is not there.
    """

    def __init__(self, model: str = DETECTOR, device: str = "cpu") -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.name, self.device = model, device
        with fetching(model, "spatial:<folder>") as folder, quiet_loading():
            self.processor = AutoProcessor.from_pretrained(folder)
            check_tokenizer(self.processor.tokenizer, folder)
            self.model = load_network(AutoModelForZeroShotObjectDetection, folder).eval().to(device)

    @frozen_call
    def __call__(self, picture: Image.Image, words: Sequence[str]) -> list[Detection]:
        """Detections of ``words`` in one picture, most confident first; none where nothing is looked for."""
        if not words:
            return []
        texts = [[f"a photo of a {word}" for word in words]]
        inputs = self.processor(text=texts, images=picture.convert("RGB"), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        (result,) = self.processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[(picture.height, picture.width)]
        )
        return _detections(result, dict(enumerate(words)))
