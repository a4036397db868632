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
    "guidance_scale": 4.0,
    "max_nfe": 32,
    "finish_steps": 2,  # an early x0 is blurred; two coarse steps make it a picture
    "attention_stride": 2,
    "mask": "neglected_token",
    # The packaged CLIP's cosines of generated pictures: mean and standard deviation.
    "reward": {"clip_mean": 0.64, "clip_std": 0.12, "efficiency": 0.004},
}

# What the models from the Hub share: CLIP, DINOv2 and ImageReward look at previews that a distilled decoder makes.
HUB: dict[str, Any] = {
    "clip": "open_clip:ViT-L-14/openai",
    "dino": "facebook/dinov2-small",
    "scorer": "imagereward",
    "prompts": "addiff_env:data/everyday.txt",
    "device": "auto",
    "dtype": "auto",
    "preview": "taesd",
}

SD15: dict[str, Any] = HUB | {
    "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "preview_model": "madebyollin/taesd",
    "height": 512,
    "width": 512,
    "num_inference_steps": 50,
    "guidance_scale": 7.5,
    "batch_size": 16,  # addiff profile --memory: what a call of so many lanes takes
}

SDXL: dict[str, Any] = HUB | {
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "preview_model": "madebyollin/taesdxl",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "batch_size": 4,
}

FLUX_SCHNELL: dict[str, Any] = HUB | {
    "model": "black-forest-labs/FLUX.1-schnell",
    "preview_model": "madebyollin/taef1",
    "height": 1024,
    "width": 1024,
    "solver": "euler",
    "num_inference_steps": 4,
    "guidance_scale": 0.0,
    "warmup_steps": 1,
    "attention_stride": 2,
    "batch_size": 4,
}

PRESETS = {
    "AdDiffusion-Tiny-v0": TINY,
    "AdDiffusion-SD15-v0": SD15,
    "AdDiffusion-SDXL-v0": SDXL,
    "AdDiffusion-FluxSchnell-v0": FLUX_SCHNELL,
}

for _id, _settings in PRESETS.items():
    gym.register(
        _id,
        entry_point="addiff_env.env:DiffusionDenoiseEnv",
        vector_entry_point="addiff_env.env:DiffusionDenoiseVectorEnv",
        kwargs=dict(_settings),
    )
