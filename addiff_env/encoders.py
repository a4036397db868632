"""Frozen feature encoders: CLIP for pictures and texts, DINO for pictures. Batched, on the device, shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from addiff_env.loading import quiet_loading, shared

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _load(loader: Any, model: str, what: str, **options: Any) -> Any:
    try:
        with quiet_loading():
            return loader.from_pretrained(model, **options)
    except Exception as error:
        missing = not Path(model).exists()
        kind = FileNotFoundError if missing else ValueError
        hint = "download it or pass a local folder" if missing else "a file there is damaged or incomplete"
        raise kind(f"cannot load {what} from {model!r}: {error}; {hint}") from error


def check_pictures(pictures: torch.Tensor) -> None:
    """Refuse anything but finite pictures (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: with the offending shape or values.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) == 0:
        raise ValueError(f"expected pictures (B, 3, H, W) with B > 0, got {tuple(pictures.shape)}")
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise ValueError(f"pictures must be finite and lie in [0, 1], got values from {low:.4g} to {high:.4g}")


def resize_and_normalise(
    pictures: torch.Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Bicubic, antialiased resize of (B, 3, H, W) to ``size`` squared, then per-channel normalisation."""
    if pictures.shape[-2:] != (size, size):
        pictures = F.interpolate(pictures, (size, size), mode="bicubic", antialias=True, align_corners=False)
    scale = pictures.new_tensor(std).view(3, 1, 1)
    return (pictures.clamp(0, 1) - pictures.new_tensor(mean).view(3, 1, 1)) / scale


class CLIPEncoder:
    """A CLIP model (Radford et al. 2021) in transformers' layout; features are unit vectors.

    Raises:
        FileNotFoundError: no such model; ValueError: its files are damaged.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.model = _load(CLIPModel, model, "a CLIP model").float().to(device).eval().requires_grad_(False)
        self.tokenizer = _load(CLIPTokenizer, model, "CLIP's tokenizer")
        processor = _load(CLIPImageProcessor, model, "CLIP's image processor")
        self.mean, self.std = tuple(processor.image_mean), tuple(processor.image_std)
        self.size, self.width = self.model.config.vision_config.image_size, self.model.config.projection_dim
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def image_features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, width) float32 of pictures (B, 3, H, W) in [0, 1]."""
        pixels = resize_and_normalise(pictures.float(), self.size, self.mean, self.std)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Features (B, width) float32 of texts, computed once per prompt."""
        for prompt in prompts:
            if prompt not in self._texts:
                if len(self._texts) > 4096:
                    self._texts.clear()
                self._texts[prompt] = self.encode_text(prompt)
        return torch.stack([self._texts[prompt] for prompt in prompts])

    @torch.no_grad()
    def encode_text(self, prompt: str) -> torch.Tensor:
        """Features (width,) float32 of one text, computed anew."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        device = self.model.device
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)[0]


class DINOEncoder:
    """A DINO model (Caron et al. 2021; Oquab et al. 2024) in transformers' layout; unit feature vectors.

    Raises:
        FileNotFoundError: no such model; ValueError: its files are damaged.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModel

        # DINO has no pooler; DINOv2 models take no such option.
        config = _load(AutoConfig, model, "a DINO configuration")
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        self.model = _load(AutoModel, model, "a DINO model", **options).float().to(device).eval().requires_grad_(False)
        self.size, self.width = self.model.config.image_size, self.model.config.hidden_size

    @torch.no_grad()
    def image_features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, width) float32 of pictures (B, 3, H, W) in [0, 1]: the CLS token."""
        pixels = resize_and_normalise(pictures.float(), self.size, *IMAGENET)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)


@shared
def load_clip(model: str, device: str) -> CLIPEncoder:
    """The shared `CLIPEncoder` of these arguments."""
    return CLIPEncoder(model, device)


@shared
def load_dino(model: str, device: str) -> DINOEncoder:
    """The shared `DINOEncoder` of these arguments."""
    return DINOEncoder(model, device)
