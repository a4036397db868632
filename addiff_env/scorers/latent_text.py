"""`LatentTextReward` foretells a verdict from clean predictions themselves: nothing has to be decoded to ask it.

Its two outputs answer what a policy wonders about: does the picture satisfy its prompt if the lane is stopped here, and
does it if the lane goes on to the end of the schedule?
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from addiff_env.loading import shared
from addiff_env.scorers.base import LOGIT_LIMIT
from addiff_env.scorers.pixel_text import PromptReader, Residual

MODEL_TYPE = "latent_text_reward"
OUTCOMES = ("stop", "go_on")
TIMESTEP_WIDTH = 64


class LatentTextReward(PromptReader):
    """A small verifier of latents: clean prediction, noise level and prompt to two logits.

    A convolutional stem turns the latents into tokens of 2x2 cells; these, the prompt's tokens and one learned read-out
    token, which also knows the noise level, pass through a transformer. Logits are calibrated for the grid, the finish
    and the refinements of the environment that its training data came from.

    Args:
        channels, cells: of the latents: C, and the side h = w.
        training_timesteps: of the diffusion model; timestep 0 means a finished picture.
        calibration: scale and bias of each outcome's logit, ((scale, bias), (scale, bias)).
    """

    limit = LOGIT_LIMIT
    mean, std = 0.0, 1.0  # the reward takes the logit's own probability for quality
    model_type = MODEL_TYPE

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
        training_timesteps: int = 1000,
    ) -> None:
        config = {
            "channels": channels,
            "cells": cells,
            "stem": stem,
            "training_timesteps": training_timesteps,
        }
        super().__init__(vocab_size, max_length, width, layers, heads, (cells // 2) ** 2, config)
