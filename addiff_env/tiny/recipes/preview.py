"""Distil the autoencoder's decoder into a smaller one, for previews alone (as TAESD, Bohan 2023, is to a VAE).

``addiff world train preview`` writes ``<out>/preview``, to be used with the settings ``preview=taesd`` and
``preview_model=addiff_env:tiny/weights/preview``. The teacher is ``<out>/pipeline/vae``; its encoder is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from addiff_env.tiny.recipes import autoencoder, common, data

MOST_NOISE = 0.5  # standard deviations of a latent; clean predictions of early steps are not quite of pictures
UNSEEN = 10_000  # a part of the scenes that no training set has


def losses(
    model: AutoencoderTiny, teacher: AutoencoderTiny, pictures: torch.Tensor, noise: torch.Tensor, amount: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far the student is from what the teacher decodes.

    Args:
        model: the student.
        teacher: frozen.
        pictures: (B, 3, 64, 64) in [0, 1].
        noise: standard normal (B, 8, 16, 16).
        amount: of the noise (B, 1, 1, 1), up to `MOST_NOISE`.
    """
    with torch.no_grad():
        latents = teacher.encoder(pictures * 2 - 1).float() + amount * noise
        wanted = (teacher.decoder(latents).float() + 1) / 2
    l1, l2 = autoencoder.weighted_errors((model.decoder(latents).float() + 1) / 2, wanted)
    return {"loss": l1 + 5 * l2, "l1": l1, "l2": l2}


@torch.no_grad()
def psnr(model: AutoencoderTiny, teacher: AutoencoderTiny, pictures: torch.Tensor, amount: float) -> float:
    """Peak signal-to-noise ratio in dB of what the student decodes, the teacher's pictures being the signal.

    Args:
        model: the student.
        teacher: what it learned from.
        pictures: (B, 3, 64, 64) in [0, 1], encoded by the teacher.
        amount: of standard normal noise that is added to their latents, drawn with seed 0.
    """
    latents = teacher.encoder(pictures * 2 - 1)
    latents = latents + amount * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    found, wanted = ((one.decoder(latents) / 2 + 0.5).clamp(0, 1) for one in (model, teacher))
    return float(-10 * F.mse_loss(found, wanted).log10())


def main(argv: Sequence[str] | None = None) -> int:
    """Train and export; returns the exit status."""
    args = common.arguments("world train preview", __doc__ or "", argv, steps=4000, batch=16, lr=2e-3)
    data.prepare(args.work, seed=args.seed)
    pictures, _ = data.load(args.work)
    torch.manual_seed(args.seed)
    teacher = AutoencoderTiny.from_pretrained(args.out / "pipeline" / "vae").float().to(args.device).eval()
    model = autoencoder.build(16, (3, 2, 0))  # no block at the picture's own resolution
    model.encoder.load_state_dict(teacher.requires_grad_(False).encoder.state_dict())
    model.encoder.requires_grad_(False)
    model.to(args.device, memory_format=torch.channels_last)
    ema = common.EMA(model, 0.998)
    loop = common.Loop("preview", args, {"model": model, "ema": ema.model}, args.lr)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        batch = common.to_input(pictures[common.batch_indices(generator, len(pictures), args.batch)], args.device)
        noise = torch.randn(args.batch, teacher.config.latent_channels, 16, 16, generator=generator).to(args.device)
        amount = MOST_NOISE * torch.rand(args.batch, 1, 1, 1, generator=generator).to(args.device)
        return losses(model, teacher, batch, noise, amount)

    loop.run(loss_at, ema.update)
    _, fresh = data.render_chunk((args.seed, UNSEEN))
    held_out = common.to_input(torch.from_numpy(fresh), args.device)
    told = {f"psnr_noise_{amount:g}": psnr(ema.model, teacher, held_out, amount) for amount in (0.0, MOST_NOISE)}
    ema.model.half().save_pretrained(args.out / "preview")
    common.keep_result(args, "preview", {"steps": loop.step, "seconds": round(loop.seconds), **told})
    return 0
