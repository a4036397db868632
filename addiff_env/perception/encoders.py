"""Frozen feature encoders: CLIP for pictures and texts, DINO for pictures. Batched, on the device, shared.

A CLIP setting is one of

- ``<folder or Hub id>``: a model in transformers' layout, by `CLIPEncoder`;
- ``open_clip:<architecture>/<tag>``: weights that open_clip knows by tag, e.g. ``open_clip:ViT-L-14/openai``;
- ``open_clip:<architecture>@<file>``: a local checkpoint of that architecture. OpenAI's weights were trained with
  QuickGELU, which a file cannot say: name the architecture ``ViT-L-14-quickgelu``;
- ``open_clip:local-dir:<folder>`` and ``open_clip:hf-hub:<Hub id>``: weights beside their ``open_clip_config.json``.
"""

from __future__ import annotations

import difflib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from addiff_env.loading.damage import wrong_at
from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import check_finite, check_tokenizer, load_network, quiet_loading, reason, shared
from addiff_env.perception.preprocessing import IMAGENET, Preprocess, check_pairs, check_pictures, check_texts

OPEN_CLIP = "open_clip:"
_SCHEMAS = ("local-dir:", "hf-hub:")  # open_clip's own
_CACHED_TEXTS = 4096  # features kept; prompts repeat within an evaluation, not for ever


def _load(load: Any, model: str, what: str, **options: Any) -> Any:
    folder = resolve_model(model)
    try:
        with quiet_loading():
            return load(folder, **options)
    except Exception as error:
        missing = not Path(folder).exists()
        kind = FileNotFoundError if missing else ValueError
        hint = "download it or pass a local folder" if missing else "a file there is damaged, incomplete or another's"
        raise kind(f"cannot load {what} from {looked_at(model)}: {reason(error)}{wrong_at(folder)}; {hint}") from error


def _load_model(loader: Any, model: str, what: str, **options: Any) -> Any:
    """A frozen network whose weights are all there, and numbers."""
    network = _load(partial(load_network, loader), model, what, **options)
    return network.float().eval().requires_grad_(False)


class ContrastiveEncoder(ABC):
    """What CLIP models share: pictures and texts become unit vectors of one space (Radford et al. 2021).

    Attributes:
        width: of the features.
        size, mean, std: side (pixels) and normalisation of the network's input.
        preprocess: from pictures in [0, 1] to that input.
        device: where the model lives.
    """

    width: int
    device: torch.device

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self.size, self.mean, self.std = preprocess.size, preprocess.mean, preprocess.std
        self._texts: dict[str, torch.Tensor] = {}

    @frozen_call
    def image_features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, width) float32 of pictures (B, 3, H, W) in [0, 1].

        Raises:
            TypeError, ValueError: as `check_pictures`.
        """
        check_pictures(pictures)
        return F.normalize(self._embed_pixels(self.preprocess(pictures.to(self.device))).float(), dim=-1)

    @frozen_call
    def text_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features (B, width) float32 of texts, computed once per prompt.

        Raises:
            TypeError, ValueError: as `check_texts`.
        """
        rows = []
        for prompt in check_texts(prompts):
            if prompt not in self._texts:
                if len(self._texts) >= _CACHED_TEXTS:
                    self._texts.clear()
                self._texts[prompt] = self.encode_text(prompt)
            rows.append(self._texts[prompt])
        return torch.stack(rows)

    def forget_texts(self) -> None:
        """Compute every text's features anew from here on."""
        self._texts.clear()

    @frozen_call
    def encode_text(self, prompt: str) -> torch.Tensor:
        """Features (width,) float32 of one text, computed anew; what is too long is truncated."""
        return F.normalize(self._embed_text(prompt).float(), dim=-1)

    @frozen_call
    def similarity(self, pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Cosines (B,) float32 of pictures (B, 3, H, W) in [0, 1] and their prompts.

        Raises:
            TypeError, ValueError: as `check_pairs`.
        """
        texts = check_pairs(pictures, prompts)
        return (self.image_features(pictures) * self.text_features(texts)).sum(1)

    @abstractmethod
    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unnormalised features (B, width) of what `preprocess` made."""

    @abstractmethod
    def _embed_text(self, prompt: str) -> torch.Tensor:
        """Unnormalised features (width,) of a text."""


class CLIPEncoder(ContrastiveEncoder):
    """A CLIP model in transformers' layout.

    Args:
        model: folder or Hub id of the weights.
        device: where it lives.
        processor: folder or Hub id of tokenizer and image processor, if they are not beside the weights.

    Raises:
        FileNotFoundError: no such model; ValueError: its files are damaged, or of another model.
    """

    def __init__(self, model: str, device: str = "cpu", processor: str | None = None) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.model = _load_model(CLIPModel, model, "a CLIP model").to(device)
        self.tokenizer = _load(CLIPTokenizer.from_pretrained, processor or model, "CLIP's tokenizer")
        check_tokenizer(self.tokenizer, processor or model)
        super().__init__(
            Preprocess.of_processor(
                _load(CLIPImageProcessor.from_pretrained, processor or model, "CLIP's image processor")
            )
        )
        self.width, self.device = self.model.config.projection_dim, torch.device(device)

    @property
    def logit_scale(self) -> float:
        """The learnt inverse temperature that cosines are multiplied by in the contrastive loss."""
        return float(self.model.logit_scale.exp())

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    def _embed_text(self, prompt: str) -> torch.Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        pooled = self.model.text_model(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
        ).pooler_output
        return self.model.text_projection(pooled)[0]


class OpenCLIPEncoder(ContrastiveEncoder):
    """A CLIP model of open_clip (Cherti et al. 2023; Ilharco et al. 2021).

    Args:
        model: an open_clip model, whatever its weights; it is moved and frozen.
        tokenizer: texts to token ids (B, context), as `open_clip.get_tokenizer` gives it.
        device: where it lives.
        preprocess: None does what the model's own configuration says.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, device: str = "cpu", preprocess: Preprocess | None = None
    ) -> None:
        from open_clip import get_model_preprocess_cfg

        super().__init__(preprocess or Preprocess.of_open_clip(get_model_preprocess_cfg(model)))
        self.model = model.float().to(device).eval().requires_grad_(False)
        self.tokenizer, self.device = tokenizer, torch.device(device)
        self.width = int(self.encode_text("").shape[0])

    @classmethod
    def from_setting(cls, setting: str, device: str = "cpu") -> OpenCLIPEncoder:
        """The model of a setting ``open_clip:...``; this module's docstring lists the forms.

        Raises:
            FileNotFoundError: the weights are not there; the message says what to download.
            ValueError: an unknown architecture or tag, or weights that are damaged, foreign or not finite.
        """
        import open_clip

        name = setting.removeprefix(OPEN_CLIP)
        architecture, weights = parse_open_clip(name)
        options = {"require_pretrained": True, "force_quick_gelu": _uses_quick_gelu(architecture, weights)}
        try:
            with quiet_open_clip():
                model = open_clip.create_model(architecture, pretrained=weights, **options)
                tokenizer = open_clip.get_tokenizer(architecture)
        except Exception as error:
            raise _explain(setting, architecture, weights, error) from error
        check_finite(model.state_dict(), setting)
        return cls(model, tokenizer, device)

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)

    def _embed_text(self, prompt: str) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer([prompt]).to(self.device))[0]


def parse_open_clip(name: str) -> tuple[str, str | None]:
    """Architecture and weights (a tag or a file) of what follows ``open_clip:``.

    Raises:
        ValueError: no such form, or an architecture or tag that open_clip does not know.
    """
    import open_clip

    if name.startswith(_SCHEMAS):
        scheme, _, place = name.partition(":")
        if scheme == "local-dir" and not Path(resolve_model(place)).is_dir():
            raise FileNotFoundError(f"there is no folder {looked_at(place)}, of {OPEN_CLIP + name!r}")
        return f"{scheme}:{resolve_model(place)}", None
    at_file = "@" in name
    architecture, _, weights = name.partition("@" if at_file else "/")
    if not architecture or not weights:
        raise ValueError(
            f"cannot read {OPEN_CLIP + name!r}: expected open_clip:<architecture>/<tag>, "
            "open_clip:<architecture>@<file>, open_clip:local-dir:<folder> or open_clip:hf-hub:<id>"
        )
    known = open_clip.list_models()
    if architecture not in known:
        close = ", ".join(difflib.get_close_matches(architecture, known, 5)) or ", ".join(known[:5]) + ", ..."
        raise ValueError(f"open_clip has no architecture {architecture!r}; similar: {close}")
    if not at_file and not open_clip.get_pretrained_cfg(architecture, weights):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise ValueError(
            f"open_clip has no weights {weights!r} for {architecture}; known: {tags or 'none'} "
            f"(a file is given as open_clip:{architecture}@<file>)"
        )
    if not at_file:
        return architecture, weights
    place = resolve_model(weights)
    if not Path(place).is_file():
        raise FileNotFoundError(f"there is no checkpoint {looked_at(weights)} for open_clip's {architecture}")
    return architecture, place


def _uses_quick_gelu(architecture: str, weights: str | None) -> bool:
    """Whether a tag's weights were trained with QuickGELU: open_clip only warns if the architecture does not use it."""
    import open_clip

    return weights is not None and bool(open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu"))


def _explain(setting: str, architecture: str, weights: str | None, error: Exception) -> Exception:
    """What to raise when open_clip could not load ``setting``: missing weights, or bad ones."""
    import open_clip

    what = f"cannot load {setting!r}: {reason(error)}"
    place = weights if weights is not None else architecture.removeprefix("local-dir:")
    if Path(place).exists():
        what += wrong_at(place) if Path(place).is_dir() else ""
        return ValueError(f"{what}; the weights there are damaged, or of another architecture")
    known = open_clip.get_pretrained_cfg(architecture, weights) if weights is not None else {}
    repo = (known.get("hf_hub") or known.get("url") or architecture.removeprefix("hf-hub:")).rstrip("/")
    file = "open_clip_model.safetensors (or open_clip_pytorch_model.bin)"
    local = architecture + ("-quickgelu" if _uses_quick_gelu(architecture, weights) else "")
    return FileNotFoundError(
        f"{what}; download {file} from the Hub repository {repo} and pass open_clip:{local}@<file>"
    )


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """`quiet_loading` for open_clip, whose remarks on what goes well are kept out of the root logger.

    The first remark would also give the root logger a handler, and the program's own logging would come too late.
    """
    root = logging.getLogger()
    stand_in = None if root.handlers else logging.lastResort
    with quiet_loading():
        if stand_in is not None:
            root.addHandler(stand_in)
        root.addFilter(_is_no_remark)
        try:
            yield
        finally:
            root.removeFilter(_is_no_remark)
            if stand_in is not None:
                root.removeHandler(stand_in)


def _is_no_remark(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "open_clip" not in Path(record.pathname).parts


class DINOEncoder:
    """A DINO model (Caron et al. 2021; Oquab et al. 2024) in transformers' layout; unit feature vectors.

    Pictures are prepared as the model's own image processor says; a folder without one gets the shortest side resized
    to the network's ``image_size``, a centre crop and ImageNet's normalisation. DINOv2 is trained at 518 pixels and
    used at 224 after a resize to 256: its position embeddings are interpolated.

    Raises:
        FileNotFoundError: no such model; ValueError: its files are damaged, or of another model.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoConfig, AutoModel

        # DINO has no pooler; DINOv2 models take no such option.
        config = _load(AutoConfig.from_pretrained, model, "a DINO configuration")
        if not hasattr(config, "image_size"):  # CLIP's has one a tower, a text model none
            raise ValueError(f"{model!r} is not a DINO model but of type {config.model_type!r}")
        self._interpolates = config.model_type == "vit"  # on demand; DINOv2 does so by itself
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        self.model = _load_model(AutoModel, model, "a DINO model", **options).to(device)
        self.preprocess = _dino_preprocess(model, config.image_size)
        self.size, self.width = self.preprocess.size, self.model.config.hidden_size
        self.device = torch.device(device)

    @frozen_call
    def image_features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features (B, width) float32 of pictures (B, 3, H, W) in [0, 1]: the CLS token.

        Raises:
            TypeError, ValueError: as `check_pictures`.
        """
        check_pictures(pictures)
        pixels = self.preprocess(pictures.to(self.device))
        options = {"interpolate_pos_encoding": True} if self._interpolates else {}
        return F.normalize(self.model(pixel_values=pixels, **options).last_hidden_state[:, 0], dim=-1)


def _dino_preprocess(model: str, image_size: int) -> Preprocess:
    from transformers import AutoImageProcessor

    names = ("preprocessor_config.json", "processor_config.json")
    folder = resolve_model(model)
    if Path(folder).is_dir() and not any(Path(folder, name).is_file() for name in names):
        return Preprocess(image_size, *IMAGENET)
    return Preprocess.of_processor(_load(AutoImageProcessor.from_pretrained, model, "DINO's image processor"))


@shared
def load_clip(model: str, device: str) -> ContrastiveEncoder:
    """The shared CLIP encoder of a setting; raises as `CLIPEncoder` and `OpenCLIPEncoder.from_setting`."""
    if model.startswith(OPEN_CLIP):
        return OpenCLIPEncoder.from_setting(model, device)
    return CLIPEncoder(model, device)


@shared
def load_dino(model: str, device: str) -> DINOEncoder:
    """The shared `DINOEncoder` of these arguments."""
    return DINOEncoder(model, device)
