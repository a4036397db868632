"""From pictures to a network's input: checks, and what a model's own image processor does, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, crop, resize

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RANGE_TOLERANCE = 0.01  # decoders overshoot [0, 1] a little; more than this is a mistake of the caller
PIXELS_AT_ONCE = 2**22  # of pictures that are prepared: four of 1024 x 1024, whatever the batch
RESIZES = ("shortest", "longest", "squash")
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}  # what an image processor's `resample` number means
_skip_validation: ContextVar[bool] = ContextVar("skip_validation", default=False)


@contextmanager
def unvalidated_pictures() -> Iterator[None]:
    """While the context lasts, `check_pictures` takes the caller's word that values are finite and in [0, 1].

    Asking a GPU for its values means waiting for all that it was told to do; the environment knows its own pictures.
    """
    token = _skip_validation.set(True)
    try:
        yield
    finally:
        _skip_validation.reset(token)


def check_pictures(pictures: torch.Tensor) -> None:
    """Refuse anything but finite pictures (B, 3, H, W) in [0, 1].

    Raises:
        TypeError: no tensor. ValueError: with the offending shape, dtype or values.
    """
    if not isinstance(pictures, torch.Tensor):
        raise TypeError(f"pictures must be a tensor (B, 3, H, W), got {type(pictures).__name__}")
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"expected pictures of shape (B, 3, H, W), got {tuple(pictures.shape)}")
    if pictures.numel() == 0:
        raise ValueError(f"an empty batch of pictures, {tuple(pictures.shape)}, has no features or scores")
    if not pictures.is_floating_point():
        raise ValueError(f"pictures must be floating point in [0, 1], got {pictures.dtype}; divide 0-255 by 255")
    if _skip_validation.get():
        return
    low, high = torch.stack(torch.aminmax(pictures.detach())).tolist()  # one transfer; NaN if any value is
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
        raise ValueError(f"pictures lie in [0, 1] without NaN, got [{low:.4g}, {high:.4g}]")


def check_texts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list.

    Raises:
        TypeError: a single string where a list belongs, or an entry that is no string. ValueError: none at all.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, one per picture, got the string {prompts!r}")
    texts = list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a string, got {type(text).__name__}: {text!r}")
    if not texts:
        raise ValueError("an empty list of prompts has no features or scores")
    return texts


def check_pairs(pictures: torch.Tensor, prompts: Sequence[str]) -> list[str]:
    """Both checks, and that every picture has its prompt; returns the prompts as a list.

    Raises:
        TypeError, ValueError: as `check_pictures` and `check_texts`, or the numbers differ.
    """
    check_pictures(pictures)
    texts = check_texts(prompts)
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures but {len(texts)} prompts")
    return texts


@dataclass(frozen=True)
class Preprocess:
    """A model's image processor as a function of device tensors: resize, crop or pad, normalise.

    Nothing passes through PIL, but its fixed-point arithmetic is done here as well, so that the pixels are those of
    the official processors, bit for bit.

    Attributes:
        size: side of the network's square input, pixels.
        mean, std: per channel, of pictures in [0, 1].
        resize: ``shortest`` side to ``edge``, then the centre is cropped (CLIP, DINOv2);
            ``longest`` side to ``size``, then black bars are added (HPS v2); ``squash`` to ``size`` whatever the
            proportions (DINO).
        edge: pixels that the shortest side gets before the crop; None is ``size``.
        interpolation: ``bicubic`` or ``bilinear``; both antialiased.
        eight_bit: round pictures to 1/255 and resample them as Pillow does (`resize_as_pillow`); False where the
            official code resizes float tensors. Pictures that have the right size already are not rounded.
        round_down: where the crop cannot stand in the middle of whole pixels, round its margin down, as transformers
            does; False rounds half a pixel to an even number, as torchvision does (OpenAI's CLIP, open_clip).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "shortest"
    edge: int | None = None
    interpolation: str = "bicubic"
    eight_bit: bool = True
    round_down: bool = False

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ValueError(f"unknown resize {self.resize!r}; known: {', '.join(RESIZES)}")
        if self.interpolation not in _PILLOW_FILTERS.values():
            known = ", ".join(_PILLOW_FILTERS.values())
            raise ValueError(f"unknown interpolation {self.interpolation!r}; known: {known}")

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Network input (B, 3, size, size) float32 of pictures (B, 3, H, W) in [0, 1]."""
        at_once = max(1, PIXELS_AT_ONCE // pictures.shape[-2:].numel())
        pixels = torch.cat([self._fit(part.float().clamp(0, 1)) for part in pictures.split(at_once)])
        return (pixels - _per_channel(self.mean, pixels.device)) / _per_channel(self.std, pixels.device)

    def _fit(self, pictures: torch.Tensor) -> torch.Tensor:
        if self.resize == "squash":
            return self._resize(pictures, self.size, self.size)
        if self.resize == "longest":
            return self._pad(self._resize(pictures, *self._inside(*pictures.shape[-2:])))
        return self._crop(self._resize(pictures, *self._around(*pictures.shape[-2:])))

    def _crop(self, pictures: torch.Tensor) -> torch.Tensor:
        margins = [side - self.size for side in pictures.shape[-2:]]
        if not self.round_down or min(margins) < 0:
            return center_crop(pictures, [self.size, self.size])
        top, left = (margin // 2 for margin in margins)
        return crop(pictures, top, left, self.size, self.size)

    def _inside(self, height: int, width: int) -> tuple[int, int]:
        """Size with the longest side at ``size``, in the same proportions."""
        scale = self.size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _around(self, height: int, width: int) -> tuple[int, int]:
        """Size with the shortest side at ``edge``, in the same proportions (rounded down, as torchvision does)."""
        edge, shortest = self.edge or self.size, min(height, width)
        return edge * height // shortest, edge * width // shortest

    def _resize(self, pictures: torch.Tensor, height: int, width: int) -> torch.Tensor:
        if pictures.shape[-2:] == (height, width):
            return pictures
        if self.eight_bit:
            return resize_as_pillow(pictures, height, width, self.interpolation)
        return resize(pictures, [height, width], InterpolationMode(self.interpolation), antialias=True)

    def _pad(self, pictures: torch.Tensor) -> torch.Tensor:
        missing = [self.size - side for side in pictures.shape[-2:]]
        top, left = (number // 2 for number in missing)
        return F.pad(pictures, (left, missing[1] - left, top, missing[0] - top))

    @classmethod
    def of_processor(cls, processor: Any) -> Preprocess:
        """What a transformers image processor (CLIP's, BiT's for DINOv2, ViT's for DINO) does.

        Raises:
            ValueError: it does something that this class does not know; the message shows it.
        """
        _refuse_oddities(processor)
        cut = processor.crop_size if getattr(processor, "do_center_crop", None) else None
        edge, height, width = (processor.size.get(name) for name in ("shortest_edge", "height", "width"))
        interpolation = _PILLOW_FILTERS.get(int(processor.resample))
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        if interpolation and edge is not None and cut is not None and cut["height"] == cut["width"]:
            return cls(cut["height"], mean, std, "shortest", edge, interpolation, round_down=True)
        if interpolation and edge is None and cut is None and height is not None and height == width:
            return cls(height, mean, std, "squash", interpolation=interpolation)
        raise ValueError(
            f"{type(processor).__name__} with size {processor.size}, crop {cut} and resample {processor.resample} "
            "is not supported: expected a shortest edge with a square crop, or a square size"
        )

    @classmethod
    def of_open_clip(cls, config: dict[str, Any]) -> Preprocess:
        """What open_clip's own transform does with a ``preprocess_cfg`` (``size``, ``mean``, ``resize_mode``, ...).

        Raises:
            ValueError: the network's input is not square.
        """
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"open_clip models with input {height} x {width} are not supported: it must be square")
        mean, std = (config.get(name) or default for name, default in zip(("mean", "std"), OPENAI_CLIP, strict=True))
        # "random" concerns training only; open_clip evaluates such models with bicubic.
        interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
        resize = config.get("resize_mode") or "shortest"
        return cls(height, tuple(mean), tuple(std), resize, interpolation=interpolation)


def _refuse_oddities(processor: Any) -> None:
    """Refuse a transformers processor that leaves out, or adds, a part of what `Preprocess` always does.

    Raises:
        ValueError: the message shows the setting.
    """
    always = {name: getattr(processor, name, True) for name in ("do_resize", "do_rescale", "do_normalize")}
    odd = [f"{name} {value!r}" for name, value in always.items() if value is False]
    factor = getattr(processor, "rescale_factor", None)
    if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        odd.append(f"rescale_factor {factor!r} instead of 1/255")
    if getattr(processor, "do_pad", None):
        odd.append("do_pad True")
    if odd:
        raise ValueError(f"{type(processor).__name__} with {', '.join(odd)} is not supported")


# --------------------------------------------------------------------------- Pillow's resampling

_SUPPORTS = {"bilinear": 1.0, "bicubic": 2.0}  # half widths of the kernels, in pixels of the coarser grid
FAST_FLOAT64 = ("cpu",)  # devices
_BITS = 22  # Pillow's fixed point: 32 bits, less 8 of the pixel and 2 for what overshoots


def resize_as_pillow(pictures: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    """Pictures (B, 3, height, width) in [0, 1] as ``PIL.Image.resize`` makes them of 8-bit ones (B, 3, H, W).

    Antialiased, along the rows and then along the columns, with whole numbers throughout: `ImagingResample` in
    Pillow's Resample.c. They are exact in float64; where that is slow, as on most GPUs, or not to be had, in several
    products of float32, in whatever precision the device multiplies.
    """
    fast = pictures.device.type in FAST_FLOAT64
    pixels = (pictures.clamp(0, 1) * 255).round().to(torch.float64 if fast else torch.float32)
    with torch.autocast(pictures.device.type, enabled=False):
        for axis, target in ((-1, width), (-2, height)):
            if (size := pixels.shape[axis]) != target:
                pixels = _resample(pixels, axis, _pillow_weights(size, target, interpolation, pixels.device, fast))
    return (pixels / 255).float()


def _resample(pixels: torch.Tensor, axis: int, weights: tuple[tuple[int, torch.Tensor], ...]) -> torch.Tensor:
    """Whole numbers (..., H, W) resampled along an axis, rounded and held in [0, 255]."""
    products = ((pixels @ part.mT if axis == -1 else part @ pixels).int() << exponent for exponent, part in weights)
    sums = reduce(torch.add, products) + (1 << _BITS - 1)
    return (sums >> _BITS).clamp(0, 255).to(pixels.dtype)


@lru_cache(maxsize=64)
def _pillow_weights(
    size: int, target: int, interpolation: str, device: torch.device, whole: bool
) -> tuple[tuple[int, torch.Tensor], ...]:
    """Coefficients (target, size) in units of 2 ** -`_BITS`; each row adds up to about 1.

    Either ``whole``, as float64, or the sum of parts, each a power of two (its exponent first) times whole numbers that
    half precision holds, and whose products with pixels add up in float32 without rounding.
    """
    scale = size / target
    stretch = max(scale, 1.0)  # antialiasing: a kernel spans as many pixels as are to become one
    support = _SUPPORTS[interpolation] * stretch
    centres = (np.arange(target)[:, None] + 0.5) * scale
    places = np.arange(size)[None]
    inside = (places >= np.floor(centres - support + 0.5)) & (places < np.floor(centres + support + 0.5))
    weights = np.where(inside, _kernel((places - centres + 0.5) / stretch, interpolation), 0.0)
    weights = weights * (1 / weights.sum(1, keepdims=True))
    left, parts = np.trunc(weights * 2**_BITS + np.copysign(0.5, weights)).astype(np.int64), []
    bits = 32 if whole else min(8, 17 - int(inside.sum(1).max()).bit_length())  # of 24: 8 are the pixel's
    for exponent in range(0, _BITS + 1, bits):
        part = (left + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)  # the lowest bits, as near to 0 as they can be
        left = (left - part) >> bits
        with torch.inference_mode(False):
            parts.append((exponent, torch.from_numpy(part).to(device, torch.float64 if whole else torch.float32)))
    return tuple(parts)


def _kernel(x: np.ndarray, interpolation: str) -> np.ndarray:
    """Triangle, or Keys's cubic convolution kernel with a = -0.5 (Keys 1981), at distances ``x`` in pixels."""
    x = np.abs(x)
    if interpolation == "bilinear":
        return np.clip(1 - x, 0, None)
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers per channel (3, 1, 1) float32, sent to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
