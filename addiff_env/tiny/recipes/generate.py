"""Make what CLIP and the reward model learn from: the diffusion model's previews and generated pictures.

``addiff world train generate --guidance 4`` writes ``<work>/previews.npz`` and
``<work>/samples/chunk_*.npz``; a killed run continues at the first missing chunk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from addiff_env.diffusion.backbones import Backbone, Prediction, denoise, initial_noise, load_backbone, to_uint8
from addiff_env.diffusion.samplers import add_noise
from addiff_env.storage.files import replacing, write_whole
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.prompt_splits import sample_train_prompt
from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.world import latent_shape

SHARES_KEPT = (0.4, 0.6, 0.8)  # of the schedule, at which a sample's preview is kept
FIRST_SEED = 500_000_000  # far from the evaluation splits' seeds


def sample(backbone: Backbone, captions: list[str], seeds: list[int], guidance: float, steps: int) -> list[np.ndarray]:
    """Pictures (B, 64, 64, 3) uint8 as they looked at each of `SHARES_KEPT`, then the finished ones."""
    shape = latent_shape(backbone)
    kept = {round(share * steps) for share in SHARES_KEPT}
    pictures: list[np.ndarray] = []

    def watch(index: int, latents: torch.Tensor, now: Prediction) -> None:
        if index + 1 in kept:
            pictures.append(to_uint8(backbone.decode(now.x0)))

    noise = initial_noise(backbone, shape, seeds)
    latents = denoise(backbone, backbone.schedule(steps, shape), captions, noise, guidance, watch)
    return [*pictures, to_uint8(backbone.decode(latents))]


def degrade(backbone: Backbone, pictures: torch.Tensor, captions: list[str], rng: torch.Generator) -> dict[str, Any]:
    """One-step x0 predictions of scenes noised to random timesteps; a quarter are blurred reconstructions instead."""
    x0 = backbone.encode_pictures(common.to_input(pictures, backbone.device))
    batch, training = len(x0), backbone.schedule(1, latent_shape(backbone)).training
    noise = torch.randn(x0.shape, generator=rng).to(x0)
    timesteps = torch.randint(150, 951, (batch,), generator=rng).to(x0.device)
    kind, strength = torch.rand(batch, generator=rng).to(x0.device), 0.5 * torch.rand(batch, generator=rng).to(x0)
    level = training.at(timesteps)
    noisy = add_noise(x0, noise, level)
    predicted = backbone.predict(noisy, timesteps, level, backbone.encode_prompts(captions), 1.0, capture=False).x0
    blurred = torch.where((kind < 0.12)[:, None, None, None], F.avg_pool2d(x0, 3, 1, 1), x0)
    blurred = blurred + strength[:, None, None, None] * noise
    plain = kind < 0.25
    decoded = backbone.decode(torch.where(plain[:, None, None, None], blurred, predicted))
    return {"pictures": to_uint8(decoded), "timesteps": torch.where(plain, 0, timesteps).cpu().numpy()}


def previews(args: argparse.Namespace, model: Backbone) -> None:
    """Write the pool: ``pictures`` (N, 64, 64, 3), ``timesteps`` (N,; 0: reconstructed) and ``index`` of the scene.

    Raises:
        ValueError: the pool that is there was made with other U-Net weights.
    """
    path = args.work / "previews.npz"
    if path.exists():
        with np.load(path) as pool:
            if str(pool["unet_sha256"]) != unet_fingerprint(args):
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
    save_arrays(path, pool | {"index": index.numpy(), "unet_sha256": np.asarray(unet_fingerprint(args))})


def make_chunk(args: argparse.Namespace, model: Backbone, chunk: int) -> dict[str, Any]:
    """Generate and judge ``args.batch`` pictures; prompts and seeds depend on the chunk's number only."""
    rng = np.random.default_rng((args.seed, chunk, FIRST_SEED))
    captions = [sample_train_prompt(rng).caption for _ in range(args.batch)]
    seeds = [FIRST_SEED + chunk * args.batch + lane for lane in range(args.batch)]
    pictures = sample(model, captions, seeds, args.guidance, args.steps)
    results = [check_picture(picture, caption) for picture, caption in zip(pictures[-1], captions, strict=True)]
    return {
        "pictures": np.stack(pictures, 1),  # (B, 4, 64, 64, 3)
        "prompt": np.asarray(captions),
        "seed": np.asarray(seeds),
        "satisfied": np.asarray([result.satisfied for result in results]),
        "score": np.asarray([result.score for result in results], np.float32),
        "objects": np.stack([pairs.describe(result.objects) for result in results]),
    }


def samples(args: argparse.Namespace, model: Backbone) -> None:
    """Write the missing chunks of ``args.number`` generated pictures."""
    folder = args.work / "samples"
    hold_configuration(folder, _configuration(args))
    started, made, satisfied = time.monotonic(), 0, 0
    total = -(-args.number // args.batch)
    for chunk, path in missing_chunks(folder, total):
        arrays = make_chunk(args, model, chunk)
        save_arrays(path, arrays)
        made, satisfied = made + args.batch, satisfied + int(arrays["satisfied"].sum())
        if made % (10 * args.batch) == 0 or chunk == total - 1:
            seconds = time.monotonic() - started
            print(f"samples {chunk + 1}/{total}  {seconds:.0f} s  satisfied {satisfied / made:.3f}", flush=True)


def missing_chunks(folder: Path, total: int) -> Iterator[tuple[int, Path]]:
    """Number and file of each of ``total`` chunks that ``folder`` does not hold."""
    for chunk in range(total):
        path = folder / f"chunk_{chunk:05d}.npz"
        if not path.exists():
            yield chunk, path


def unet_fingerprint(args: argparse.Namespace) -> str:
    """SHA-256 of the U-Net's weights that a recipe's ``--out`` holds."""
    weights = args.out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def hold_configuration(folder: Path, config: dict[str, Any]) -> None:
    """Make ``folder`` for chunks of one ``config``, which it notes in ``config.json``.

    Raises:
        ValueError: the folder holds chunks that were made with other settings or weights; the message names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.exists():
        write_whole(path, json.dumps(config, indent=2))
    elif (held := json.loads(path.read_text())) != config:
        different = [key for key in config | held if held.get(key) != config.get(key)]
        raise ValueError(f"{folder} holds what was made with another {', '.join(different)}: remove it to start anew")


def _configuration(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "guidance": args.guidance,
        "steps": args.steps,
        "batch": args.batch,
        "seed": args.seed,
        "unet_sha256": unet_fingerprint(args),
        "shares": [round(share * args.steps) / args.steps for share in SHARES_KEPT] + [1.0],
    }


def save_arrays(path: Path, arrays: dict[str, Any], compress: bool = True) -> None:
    """Write an .npz file whole or not at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)


def main(argv: Sequence[str] | None = None) -> int:
    """Make them; returns the exit status."""
    args = common.arguments(
        "world train generate",
        __doc__ or "",
        argv,
        guidance=4.0,
        number=5_000,
        previews=10_000,
        steps=10,
        batch=64,
        dtype="auto",
    )
    pairs.needs(args, "pipeline/vae", "pipeline/unet")
    model = load_backbone(str(args.out / "pipeline"), device=args.device, dtype=args.dtype, attention_stride=2)
    previews(args, model)
    samples(args, model)
    return 0
