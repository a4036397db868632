"""`PixelTextReward` stands in ImageReward's place (Xu et al. 2023) where pictures are small.

It is a transformer that looks at a picture and its prompt together and says, as one logit, whether they match.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.weights import shared
from addiff_env.perception.preprocessing import check_pairs
from addiff_env.perception.scorers.joint import JointReader, Residual, arguments_of


class PixelTextReward(JointReader):
    """A small verifier: picture and prompt to one logit, high where the picture satisfies the prompt.

    A convolutional stem turns a 64x64 picture into 8x8 tokens; these, the prompt's tokens and one
    learned read-out token pass through a transformer. ``score_mean`` and ``score_std`` are the
    logit's statistics on held-out generated pictures, for the record.
    """

    model_type = "pixel_text_reward"
    recipe = "reward"

    def __init__(
        self,
        vocab_size: int,
        max_length: int = 32,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        channels: tuple[int, ...] = (48, 96),
        size: int = 64,
        score_mean: float = 0.0,
        score_std: float = 1.0,
    ) -> None:
        config = arguments_of(locals()) | {"channels": list(channels)}
        widths = [3, *channels, width]
        stages: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            stages += [nn.Conv2d(before, after, 3, stride=2, padding=1), Residual(after)]
        super().__init__(config, nn.Sequential(*stages), (size // 2 ** (len(widths) - 1)) ** 2)
        self.head = nn.Linear(width, 1)

    def see(self, pictures: torch.Tensor) -> torch.Tensor:
        """Picture tokens (B, 64, width), row by row, of ``pictures`` (B, 3, 64, 64) in [0, 1]."""
        return self.stem(pictures * 2 - 1).flatten(2).transpose(1, 2) + self.place

    def forward(self, pictures: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits (B,) of pictures (B, 3, 64, 64) in [0, 1]; ``ids`` and ``mask`` as `tokenize` gives them."""
        return self.head(self.mix(self.see(pictures), ids, mask)[:, 0]).squeeze(-1)

    @frozen_call
    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Logits (B,) float32 of pictures (B, 3, H, W) in [0, 1] under their prompts.

        Raises:
            TypeError, ValueError: as `check_pairs`.
        """
        texts = check_pairs(pictures, prompts)
        weight = self.head.weight
        size = self.config["size"]
        pictures = pictures.detach().to(weight.device, weight.dtype).clamp(0, 1)
        if pictures.shape[-2:] != (size, size):
            pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
        return self(pictures, *self._read(texts)).float()


@shared
def load_pixel_text_reward(folder: str | Path, device: str | torch.device = "cpu") -> PixelTextReward:
    """`PixelTextReward.from_pretrained` onto ``device``, laid out for fast convolutions."""
    return PixelTextReward.from_pretrained(folder).to(device=device, memory_format=torch.channels_last)
