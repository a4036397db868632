"""Train the autoencoder (diffusers `AutoencoderTiny`, 64x64 pictures to 16x16 latents of 8 channels).

``addiff world train autoencoder`` writes ``<out>/pipeline/vae``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from addiff_env.tiny.recipes import common, data

LATENT_CHANNELS = 8


def build(width: int = 32, blocks: tuple[int, int, int] = (4, 3, 1)) -> AutoencoderTiny:
    """The untrained model, 4x downsampling; the decoder's ``width`` and ``blocks`` say what a preview costs."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(width,) * 3,
        num_encoder_blocks=(1, 2, 3),
        num_decoder_blocks=blocks,
        latent_channels=LATENT_CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )


def weighted_errors(decoded: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute and squared error of pictures (B, 3, 64, 64); pixels of objects, which are few, count fivefold."""
    chroma = wanted.amax(1, keepdim=True) - wanted.amin(1, keepdim=True)
    weight = 1 + 4 * (F.max_pool2d(chroma, 3, 1, 1) > 0.15)
    error = decoded - wanted
    return (weight * error.abs()).mean(), (weight * error**2).mean()


def losses(model: AutoencoderTiny, pictures: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """Reconstruction of ``pictures`` (B, 3, 64, 64) in [0, 1] through slightly noisy latents.

    Objects cover a small part of a picture, so their pixels weigh more. Latents are held to zero
    mean and unit variance per channel, which makes ``scaling_factor`` 1.
    """
    latents = model.encoder(pictures * 2 - 1).float()  # (B, 8, 16, 16)
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    decoded = (model.decoder(latents + 0.06 * noise).float() + 1) / 2
    l1, l2 = weighted_errors(decoded, pictures)
    statistics = (mean**2).mean() + ((variance - 1) ** 2).mean()
    return {"loss": l1 + 5 * l2 + 0.02 * statistics, "l1": l1, "l2": l2, "statistics": statistics}


def main(argv: Sequence[str] | None = None) -> int:
    """Train and export; returns the exit status."""
    args = common.arguments("world train autoencoder", __doc__ or "", argv, steps=2900, batch=32, lr=1.5e-3)
    data.prepare(args.work, seed=args.seed)
    pictures, _ = data.load(args.work)
    torch.manual_seed(args.seed)
    model = build().to(args.device, memory_format=torch.channels_last)
    ema = common.EMA(model, 0.998)
    loop = common.Loop("autoencoder", args, {"model": model, "ema": ema.model}, args.lr)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = common.to_input(pictures[common.batch_indices(generator, len(pictures), args.batch)], args.device)
        noise = torch.randn(args.batch, LATENT_CHANNELS, 16, 16, generator=generator).to(args.device)
        return losses(model, batch, noise)

    loop.run(loss_at, ema.update)
    ema.model.half().save_pretrained(args.out / "pipeline" / "vae")
    print(f"autoencoder: {loop.step} steps in {loop.seconds:.0f} s -> {args.out / 'pipeline' / 'vae'}")
    return 0
