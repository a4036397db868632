"""`LatentTextReward` foretells a verdict from clean predictions themselves: nothing has to be decoded to ask it.

It answers one question: does the picture satisfy its prompt after so many more evaluations? A policy asks it about the
evaluations that stopping takes, and about those that are left on the grid. A finished picture is looked at once, and
more closely: whether a shape is a little off decides, and costs a few convolutions at the latents' full resolution.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.weights import shared
from addiff_env.perception.preprocessing import check_texts
from addiff_env.perception.scorers.joint import JointReader, Residual, arguments_of


class LatentTextReward(JointReader):
    """A small verifier of latents: clean prediction, noise level, evaluations to come and prompt, to one logit.

    A convolutional stem turns the latents into tokens of 2x2 cells, another, deeper one those of finished pictures;
    these, the prompt's tokens and one learned read-out token, all of which know the noise level, pass through a
    transformer. The evaluations to come, or those that a finished picture was spared, meet what it read in the head
    alone, so that several questions about one picture cost little more than one.

    Args:
        channels, cells: of the latents: C, and the side h = w.
        stem: channels of the stems at full latent resolution.
        finished_blocks: residual blocks that the stem of finished pictures has there beyond the other's one.
        max_evaluations: questions about more evaluations than these are answered as if for these.
        training_timesteps: of the diffusion model; timestep 0 means a finished picture.
        scale, bias, finished_bias: calibration: the logit is scale * raw + bias, or + finished_bias at timestep 0.
    """

    model_type = "latent_text_reward"
    recipe = "verifier"

    def __init__(
        self,
        vocab_size: int,
        max_length: int = 32,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        channels: int = 8,
        cells: int = 16,
        stem: int = 64,
        finished_blocks: int = 3,
        max_evaluations: int = 10,
        training_timesteps: int = 1000,
        scale: float = 1.0,
        bias: float = 0.0,
        finished_bias: float = 0.0,
    ) -> None:
        config = arguments_of(locals())
        super().__init__(config, _stem(channels, stem, width), (cells // 2) ** 2)
        self.finished_stem = _stem(channels, stem, width)
        self.finer = nn.Sequential(*(Residual(stem) for _ in range(finished_blocks)))
        for block in self.finer:
            for parameter in block.body[-1].parameters():
                nn.init.zeros_(parameter)  # so that they can be added to a stem that has learned
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.level[-1].weight)  # learned upon tokens that mean something already
        self.evaluations = nn.Embedding(max_evaluations + 1, width)
        self.spared = nn.Embedding(max_evaluations + 1, width)
        for asked in (self.evaluations, self.spared):
            nn.init.normal_(asked.weight, std=0.02)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.latent_shape = (channels, cells, cells)
        self._copies: dict[torch.dtype, LatentTextReward] = {}

    def see(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Picture tokens (B, 64, width), row by row, of clean predictions (B, C, h, w) at ``timesteps`` (B,).

        Which of them are finished is read on the host: nothing waits for a GPU where ``timesteps`` are there already.
        """
        finished = timesteps.numpy(force=True) == 0
        if finished.all():
            seen = self._see_finished(latents)
        elif finished.any():
            index = (torch.from_numpy(np.flatnonzero(rows)) for rows in (finished, ~finished))
            done, going = (_sent(rows, latents.device) for rows in index)
            closely = self._see_finished(latents[done])
            seen = closely.new_empty(len(latents), *closely.shape[1:])
            seen[done], seen[going] = closely, self.stem(latents[going])
        else:
            seen = self.stem(latents)
        tokens = seen.flatten(2).transpose(1, 2) + self.place
        return tokens + self._level(_sent(timesteps, latents.device), tokens.dtype)[:, None]

    def _see_finished(self, latents: torch.Tensor) -> torch.Tensor:
        """Features (B, width, h / 2, w / 2) of final latents."""
        enter, first, halve, last = self.finished_stem
        features: torch.Tensor = last(halve(self.finer(first(enter(latents)))))
        return features

    def _level(self, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embedding (B, width) of the noise level."""
        half = self.config["width"] // 2
        frequencies = torch.exp(math.log(100) * torch.arange(half, device=timesteps.device) / (half - 1))
        angles = timesteps.float()[:, None] / self.config["training_timesteps"] * frequencies
        return self.level(torch.cat([angles.cos(), angles.sin()], 1).to(dtype))

    def read_out(self, mixed: torch.Tensor, timesteps: torch.Tensor, evaluations: torch.Tensor) -> torch.Tensor:
        """Logits (B, K) of the mixed tokens' read-out, not calibrated; arguments as of `score_latents`."""
        number, finished = evaluations.clamp(0, self.config["max_evaluations"]), (timesteps == 0)[:, None, None]
        asked = torch.where(finished, self.spared(number), self.evaluations(number))
        return self.head(mixed[:, :1] + asked).squeeze(-1)

    def forward(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        evaluations: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Logits (B, K); arguments as of `score_latents`, ``ids`` and ``mask`` as `tokenize` gives them."""
        mixed, timesteps = self.mix(self.see(latents, timesteps), ids, mask), _sent(timesteps, latents.device)
        raw = self.read_out(mixed, timesteps, evaluations)
        bias = torch.where(timesteps == 0, self.config["finished_bias"], self.config["bias"])
        return self.config["scale"] * raw + bias.to(raw.dtype)[:, None]

    @frozen_call
    def score_latents(
        self, latents: torch.Tensor, prompts: list[str], timesteps: torch.Tensor, evaluations: torch.Tensor
    ) -> torch.Tensor:
        """Logits (B, K) float32 that pictures satisfy their prompts after ``evaluations`` (B, K) more of them.

        ``latents`` (B, C, h, w) are clean predictions, or final latents, and are read in their own precision, as the
        denoiser works in; ``timesteps`` (B,) are the levels they stand at, 0 at the end. There ``evaluations`` are
        those that stopping early spared the picture.

        Raises:
            TypeError, ValueError: no latents, latents of another shape, or not one prompt, timestep and row of
                evaluations each.
        """
        texts = self._check(latents, prompts, timesteps, evaluations)
        device, model = self.readout.device, self._in(latents.dtype)
        latents = latents.to(device).contiguous(memory_format=torch.channels_last)
        return model(latents, timesteps, _sent(evaluations, device), *self._read(texts)).float()

    def _in(self, dtype: torch.dtype) -> LatentTextReward:
        """This model in ``dtype``; copies are kept."""
        if dtype == self.readout.dtype:
            return self
        if dtype not in self._copies:
            model = LatentTextReward(**{k: v for k, v in self.config.items() if k != "model_type"})
            model.load_state_dict(self.state_dict())
            model = model.to(self.readout.device, dtype, memory_format=torch.channels_last)
            self._copies[dtype] = model.eval().requires_grad_(False)
        return self._copies[dtype]

    def _check(
        self, latents: torch.Tensor, prompts: list[str], timesteps: torch.Tensor, evaluations: torch.Tensor
    ) -> list[str]:
        texts = check_texts(prompts)
        if latents.shape[1:] != self.latent_shape or not len(latents):
            raise ValueError(f"expected latents (B, {self.latent_shape}), at least one, got {tuple(latents.shape)}")
        if not len(latents) == len(texts) == len(timesteps) == len(evaluations) or evaluations.ndim != 2:
            raise ValueError(
                f"{len(latents)} latents, {len(texts)} prompts, {len(timesteps)} timesteps and evaluations of shape "
                f"{tuple(evaluations.shape)}: expected one of each per picture, evaluations (B, K)"
            )
        return texts


def _sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers on the device; those that are on the host are sent without waiting for it."""
    return values.to(device, non_blocking=values.device.type == "cpu")


def _stem(channels: int, inner: int, width: int) -> nn.Sequential:
    """Convolutions of latents (B, channels, h, w) to (B, width, h / 2, w / 2)."""
    halve = nn.Conv2d(inner, width, 3, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(channels, inner, 3, padding=1), Residual(inner), halve, Residual(width))


@shared
def load_latent_text_reward(folder: str | Path, device: str | torch.device = "cpu") -> LatentTextReward:
    """`LatentTextReward.from_pretrained` onto ``device``, laid out for fast convolutions."""
    return LatentTextReward.from_pretrained(folder).to(device=device, memory_format=torch.channels_last)
