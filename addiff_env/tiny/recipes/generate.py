"""Make what CLIP and the reward model learn from: the diffusion model's previews and generated pictures.

``python -m addiff_env.tiny.recipes.generate --guidance 4`` writes ``<work>/previews.npz`` and
``<work>/samples/chunk_*.npz``; a killed run continues at the first missing chunk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from addiff_env.tiny.checker import judge
from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.recipes.diffusion import build_scheduler, tokenize
from addiff_env.tiny.scenes import sample_train_prompt

SHARES_KEPT = (0.4, 0.6, 0.8)  # of the schedule, at which a sample's preview is kept
FIRST_SEED = 500_000_000  # far from the evaluation splits' seeds


class Generator:
    """The packaged diffusion model, driven directly: text embeddings, denoiser, decoder."""

    def __init__(self, folder: Path, device: str) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
        self.device, self.tokenizer = device, pipeline.tokenizer
        self.unet = pipeline.unet.to(memory_format=torch.channels_last).eval()
        self.vae = pipeline.vae.to(memory_format=torch.channels_last).eval()
        self.text_encoder = pipeline.text_encoder.eval()
        self.latent_shape = (self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size)

    def embed(self, captions: list[str]) -> torch.Tensor:
        """Text embeddings (B, 32, 160)."""
        return self.text_encoder(tokenize(self.tokenizer, captions).to(self.device)).last_hidden_state

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents (B, 8, 16, 16) of uint8 pictures (B, 64, 64, 3)."""
        return self.vae.encoder(common.to_input(pictures, self.device) * 2 - 1).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """uint8 pictures (B, 64, 64, 3)."""
        decoded = (self.vae.decoder(latents).float() + 1) / 2
        return (decoded.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()

    def velocity(self, latents: torch.Tensor, timesteps: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The U-Net's v-prediction (B, 8, 16, 16)."""
        latents = latents.contiguous(memory_format=torch.channels_last)
        return self.unet(latents, timesteps, embedding).sample.float()

    def ddim(self, latents: torch.Tensor, captions: list[str], guidance: float, steps: int) -> list[torch.Tensor]:
        """DDIM (Song et al. 2021) with classifier-free guidance: pictures at `SHARES_KEPT`, then the last."""
        scheduler = build_scheduler()
        scheduler.set_timesteps(steps)
        embedding = self.embed([""] * len(captions) + captions)
        kept = {round(share * steps) for share in SHARES_KEPT}
        pictures = []
        for done, t in enumerate(scheduler.timesteps, 1):
            both = self.velocity(torch.cat([latents, latents]), t.to(self.device), embedding)
            without, with_prompt = both.chunk(2)
            result = scheduler.step(without + guidance * (with_prompt - without), t, latents)
            latents = result.prev_sample
            if done in kept:
                pictures.append(self.decode(result.pred_original_sample))
        return [*pictures, self.decode(latents)]


def degrade(model: Generator, pictures: torch.Tensor, captions: list[str], rng: torch.Generator) -> dict[str, Any]:
    """One-step x0 predictions of scenes noised to random timesteps; a quarter are blurred reconstructions instead."""
    x0 = model.encode(pictures)
    batch = len(x0)
    noise = torch.randn(x0.shape, generator=rng).to(x0)
    timesteps = torch.randint(150, 951, (batch,), generator=rng)
    kind, strength = torch.rand(batch, generator=rng), 0.5 * torch.rand(batch, generator=rng)
    a_bar = build_scheduler().alphas_cumprod[timesteps].to(x0)[:, None, None, None]
    noisy = a_bar.sqrt() * x0 + (1 - a_bar).sqrt() * noise
    predicted = a_bar.sqrt() * noisy - (1 - a_bar).sqrt() * model.velocity(
        noisy, timesteps.to(model.device), model.embed(captions)
    )
    blurred = torch.where((kind < 0.12).to(x0.device)[:, None, None, None], F.avg_pool2d(x0, 3, 1, 1), x0)
    blurred = blurred + strength.to(x0)[:, None, None, None] * noise
    plain = kind < 0.25
    decoded = model.decode(torch.where(plain.to(x0.device)[:, None, None, None], blurred, predicted))
    return {"pictures": decoded.numpy(), "timesteps": torch.where(plain, 0, timesteps).numpy()}


def previews(args: argparse.Namespace, model: Generator) -> None:
    """Write the pool: ``pictures`` (N, 64, 64, 3), ``timesteps`` (N,; 0: reconstructed) and ``index`` of the scene.

    Raises:
        ValueError: the pool that is there was made with other U-Net weights.
    """
    path = args.work / "previews.npz"
    if path.exists():
        with np.load(path) as pool:
            if str(pool["unet_sha256"]) != _fingerprint(args):
                raise ValueError(f"{path} was made with other U-Net weights: remove it to make it anew")
        return
    scenes = pairs.load_scenes(args.work, args.seed)
    rng = torch.Generator().manual_seed(args.seed + 1)
    index = torch.randint(len(scenes.captions), (args.previews,), generator=rng)
    chunks = []
    for rows in index.split(256):
        taken = scenes.take(rows)
        chunks.append(degrade(model, taken.pictures, taken.captions, rng))
    pool = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    _save(path, pool | {"index": index.numpy(), "unet_sha256": np.asarray(_fingerprint(args))})


def make_chunk(args: argparse.Namespace, model: Generator, chunk: int) -> dict[str, Any]:
    """Generate and judge ``args.batch`` pictures; prompts and seeds depend on the chunk's number only."""
    rng = np.random.default_rng((args.seed, chunk, FIRST_SEED))
    captions = [sample_train_prompt(rng).caption for _ in range(args.batch)]
    seeds = [FIRST_SEED + chunk * args.batch + lane for lane in range(args.batch)]
    noise = [torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    pictures = model.ddim(torch.stack(noise).to(model.device), captions, args.guidance, args.steps)
    verdicts = [judge(picture.numpy(), caption) for picture, caption in zip(pictures[-1], captions, strict=True)]
    return {
        "pictures": torch.stack(pictures, 1).numpy(),  # (B, 4, 64, 64, 3)
        "prompt": np.asarray(captions),
        "seed": np.asarray(seeds),
        "satisfied": np.asarray([verdict.satisfied for verdict in verdicts]),
        "score": np.asarray([verdict.score for verdict in verdicts], np.float32),
        "objects": np.stack([pairs.describe(verdict.objects) for verdict in verdicts]),
    }


def samples(args: argparse.Namespace, model: Generator) -> None:
    """Write the missing chunks of ``args.number`` generated pictures."""
    folder = args.work / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    _hold_configuration(args, folder)
    started, made, satisfied = time.monotonic(), 0, 0
    total = -(-args.number // args.batch)
    for chunk in range(total):
        path = folder / f"chunk_{chunk:05d}.npz"
        if path.exists():
            continue
        arrays = make_chunk(args, model, chunk)
        _save(path, arrays)
        made, satisfied = made + args.batch, satisfied + int(arrays["satisfied"].sum())
        if made % (10 * args.batch) == 0 or chunk == total - 1:
            seconds = time.monotonic() - started
            print(f"samples {chunk + 1}/{total}  {seconds:.0f} s  satisfied {satisfied / made:.3f}", flush=True)


def _fingerprint(args: argparse.Namespace) -> str:
    weights = args.out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def _hold_configuration(args: argparse.Namespace, folder: Path) -> None:
    """Refuse to mix samples of different settings or weights in one folder."""
    config = {
        "guidance": args.guidance,
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "unet_sha256": _fingerprint(args),
        "shares": [round(share * args.steps) / args.steps for share in SHARES_KEPT] + [1.0],
    }
    path = folder / "config.json"
    if not path.exists():
        path.write_text(json.dumps(config, indent=2))
    elif (held := json.loads(path.read_text())) != config:
        different = [key for key in config if held.get(key) != config[key]]
        raise ValueError(f"{folder} holds samples made with another {', '.join(different)}: remove it to start anew")


def _save(path: Path, arrays: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(partial, path)


def main() -> None:
    """Command line."""
    args = common.arguments(__doc__ or "", guidance=4.0, number=5_000, previews=10_000, steps=10, batch=64)
    pairs.needs(args, "pipeline/vae", "pipeline/unet")
    model = Generator(args.out / "pipeline", args.device)
    device_type = torch.device(args.device).type
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), torch.autocast(device_type, torch.bfloat16):
        previews(args, model)
        samples(args, model)


if __name__ == "__main__":
    main()
