"""AdDiffusion: text-to-image denoising as a Markov decision process.

Importing this package registers the environments and loads nothing heavy.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

__version__ = "0.1.0"

# The embedded world: a model small enough for a laptop CPU, shipped inside the package.
TINY: dict[str, Any] = {
    "model": "addiff_env:tiny/weights/pipeline",
    "clip": "addiff_env:tiny/weights/clip",
    "dino": "addiff_env:tiny/weights/dino",
    "scorer": "addiff_env:tiny/weights/reward",
    "prompts": "addiff_env:tiny/splits/train.txt",
    "height": 64,
    "width": 64,
    "dtype": "auto",
    "num_inference_steps": 10,
    "guidance_scale": 3.0,
    "max_nfe": 32,
    "attention_stride": 2,
    "mask": "neglected_token",
    # The packaged CLIP's cosines of generated pictures: mean and standard deviation.
    "reward": {"clip_mean": 0.64, "clip_std": 0.12, "efficiency": 0.002},
}

PRESETS = {"AdDiffusion-Tiny-v0": TINY}

for _id, _settings in PRESETS.items():
    gym.register(
        _id,
        entry_point="addiff_env.env:DiffusionDenoiseEnv",
        vector_entry_point="addiff_env.env:DiffusionDenoiseVectorEnv",
        kwargs=dict(_settings),
    )
