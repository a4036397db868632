"""What a way to make pictures offers, and what those share that make them batch by batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from addiff_env.diffusion.backbones import Backbone, initial_noise
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.loading.isolation import isolated
from addiff_env.types import Generated

NOT_FINITE = "the model's numbers stopped being finite: the picture is grey"  # of a row


class Method(Protocol):
    """A way to make pictures; `make` yields them in groups, so that finished ones can be written down."""

    name: str
    solver: str
    policy: str
    backbone: Backbone  # whose pictures they are
    expected_nfe: float  # denoiser evaluations of a picture; a guess where they are not known beforehand

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""


class Batched:
    """What methods share that make their pictures batch by batch: the environment's ``batch_size`` unless told."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, name: str, batch_size: int | None = None) -> None:
        self.env, self.batch_size = env, env.config.batch_size if batch_size is None else batch_size
        self.name = self.solver = self.policy = name
        self.backbone = env.backbone
        self.expected_nfe = float(env.config.num_inference_steps)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            began = time.perf_counter()
            with isolated():
                made = self._batch(part)
            for result in made:
                result.seconds = (time.perf_counter() - began) / len(part)
            yield list(zip(part, made, strict=True))

    def _batch(self, items: list[Item]) -> list[Generated]:
        raise NotImplementedError

    def _noise(self, seeds: Sequence[int]) -> torch.Tensor:
        return initial_noise(self.env.backbone, self.env.latent_shape, seeds)

    def _generated(
        self,
        item: Item,
        picture: np.ndarray,
        passes: float,
        decodes: int = 1,
        verdicts: int = 0,
        finite: Any = True,
    ) -> Generated:
        """A result whose cost is that of `total_flops`; one that is not ``finite`` says so."""
        nfe = round(passes / self.env.passes_per_nfe)
        flops = self.total_flops(passes, decodes, verdicts)
        note = "" if finite else NOT_FINITE
        return Generated(item.prompt, item.seed, picture, [], nfe, round(passes), flops, note=note)

    def total_flops(self, passes: float, decodes: int = 1, verdicts: int = 0) -> float:
        """Net FLOPs of ``passes`` of the network, ``decodes``, and ``verdicts`` of the reward model, with the texts.

        The encoders that make an environment's observations read none of these pictures, and are not charged.
        """
        flops_per_call, perception, config = self.env.flops_per_call, self.env.perception, self.env.config
        flops = passes * flops_per_call["denoiser"] + decodes * flops_per_call["decode"]
        flops += flops_per_call["start"] - perception.text_flops()
        if not verdicts:
            return flops
        return flops + verdicts * perception.scorer_flops(config.height, config.width) + perception.scorer_text_flops()
