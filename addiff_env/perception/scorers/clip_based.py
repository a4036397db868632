"""Scorers made of a CLIP model: CLIPScore, HPS v2.1, PickScore and LAION's aesthetic predictor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.paths import resolve_model
from addiff_env.perception.encoders import CLIPEncoder, ContrastiveEncoder, OpenCLIPEncoder, load_clip, quiet_open_clip
from addiff_env.perception.preprocessing import OPENAI_CLIP, Preprocess, check_pairs
from addiff_env.perception.scorers.base import (
    LOGIT_LIMIT,
    Source,
    find_checkpoint,
    linear_head,
    load_exactly,
    read_checkpoint,
)

HPS_SOURCE = Source("xswu/HPSv2", "HPS_v2.1_compressed.pt")
HPS_ARCHITECTURE = "ViT-H-14"  # open_clip's, with GELU as in LAION-2B's weights
AESTHETIC_SOURCE = Source("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
AESTHETIC_CLIP = "open_clip:ViT-L-14/openai"
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CLIPScore:
    """Cosine of a picture's and its prompt's CLIP features.

    Hessel et al. (2021, eq. 1) multiply it by 2.5 and cut it off at 0; this is the plain cosine, which orders
    pictures the same way.
    """

    limit = 1.0
    mean, std = 0.25, 0.05  # of OpenAI's ViT-L/14; other CLIPs have others: set reward_mean and reward_std for them

    def __init__(self, encoder: ContrastiveEncoder) -> None:
        self.text_encoder = encoder

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Cosines (B,) float32 of pictures (B, 3, H, W) in [0, 1]; raises as `Scorer.score`."""
        return self.text_encoder.similarity(pictures, prompts)


class HPSv2(CLIPScore):
    """Human Preference Score v2.1 (Wu et al. 2023): the cosine in a CLIP ViT-H-14 tuned on human choices.

    Unlike CLIP's, its preprocessing shows the whole picture: the longest side becomes 224 pixels, black bars fill the
    rest, and what bicubic resizing overshoots is kept, because the official code resizes tensors.

    The official code leaves a picture whose longest side already is 224 without bars, so that it can score it only
    if it is square; here it gets them as every other does.
    """

    mean, std = 0.27, 0.03  # models of its benchmark average .24 to .28 (Wu et al. 2023); the spread is an estimate

    @staticmethod
    def preprocess(size: int = 224) -> Preprocess:
        """The official preprocessing for a network with input ``size``, pixels."""
        return Preprocess(size, *OPENAI_CLIP, resize="longest", eight_bit=False)

    @classmethod
    def from_checkpoint(cls, path: str | None = None, device: str = "cpu") -> HPSv2:
        """Load the published weights, from a local file or the Hub.

        Raises:
            FileNotFoundError, ValueError: as `find_checkpoint`, `read_checkpoint` and `load_exactly`.
        """
        import open_clip

        found = find_checkpoint(path, HPS_SOURCE, "hps")
        with quiet_open_clip():
            config = open_clip.get_model_config(HPS_ARCHITECTURE)
            tokenizer = open_clip.get_tokenizer(HPS_ARCHITECTURE)
        model = load_exactly(lambda: open_clip.CLIP(**config), read_checkpoint(found), found)
        return cls(OpenCLIPEncoder(model, tokenizer, device, cls.preprocess()))


class PickScore:
    """PickScore (Kirstain et al. 2023): exp(logit_scale) * cosine in a CLIP ViT-H-14 tuned on Pick-a-Pic."""

    mean, std = 20.5, 1.5  # Stable Diffusion's pictures mostly score 18 to 23; both are estimates

    def __init__(self, encoder: CLIPEncoder) -> None:
        self.text_encoder = encoder
        self.limit = self.scale = encoder.logit_scale

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores (B,) float32 of pictures (B, 3, H, W) in [0, 1]; raises as `Scorer.score`."""
        return self.scale * self.text_encoder.similarity(pictures, prompts)

    @classmethod
    def from_pretrained(cls, model: str | None = None, device: str = "cpu", processor: str | None = None) -> PickScore:
        """Load a folder or Hub id; the published weights' processor is that of the model they were tuned from.

        Raises:
            FileNotFoundError, ValueError: as `CLIPEncoder`.
        """
        if model is None:
            model, processor = PICKSCORE, processor or PICKSCORE_PROCESSOR
        try:
            return cls(CLIPEncoder(resolve_model(model), device, processor and resolve_model(processor)))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error} (PickScore: the Hub repository {PICKSCORE}, and the processor of {PICKSCORE_PROCESSOR}; "
                "pass pickscore:<folder>[,processor=<folder>])"
            ) from error


class Aesthetic(nn.Module):
    """LAION's improved aesthetic predictor (Schuhmann 2022): a linear head on unit CLIP ViT-L/14 picture features.

    It predicts a rating from 1 to 10 and does not read the prompt.
    """

    limit = LOGIT_LIMIT
    mean, std = 5.5, 0.75  # Stable Diffusion's pictures mostly rate 4 to 7; both are estimates

    def __init__(self, encoder: ContrastiveEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.layers = linear_head(encoder.width)

    @frozen_call
    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Ratings (B,) float32 of pictures (B, 3, H, W) in [0, 1]; raises as `Scorer.score`."""
        check_pairs(pictures, prompts)
        return self.layers(self.encoder.image_features(pictures)).squeeze(-1)

    @classmethod
    def from_checkpoint(cls, path: str | None = None, device: str = "cpu", clip: str = AESTHETIC_CLIP) -> Aesthetic:
        """Load the published head, from a local file or the Hub; ``clip`` must be OpenAI's ViT-L/14, wherever it is.

        Raises:
            FileNotFoundError, ValueError: as `find_checkpoint`, `read_checkpoint`, `load_exactly` and `load_clip`.
        """
        found = find_checkpoint(path, AESTHETIC_SOURCE, "aesthetic")
        state = read_checkpoint(found)
        encoder = load_clip(resolve_model(clip), device)
        return load_exactly(lambda: cls(encoder), state, found).to(device)


CLIP_BASED: dict[str, Any] = {
    "hps": HPSv2.from_checkpoint,
    "pickscore": PickScore.from_pretrained,
    "aesthetic": Aesthetic.from_checkpoint,
}
