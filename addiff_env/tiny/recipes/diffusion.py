"""Train the text encoder and the U-Net together, classifier-free guidance and EMA included.

``addiff world train diffusion`` needs the autoencoder and writes the rest of
``<out>/pipeline``, an ordinary `StableDiffusionPipeline` folder. Latents are encoded once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from scipy.stats import beta
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from addiff_env.tiny.prompts import CATEGORIES, RELATION_AXES, SHAPES, parse_caption
from addiff_env.tiny.recipes import common, data
from addiff_env.tiny.recipes.autoencoder import LATENT_CHANNELS
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

TEXT_WIDTH = 160
_PER_SHAPE = 4  # numbers of `caption_layout`


def build_unet() -> UNet2DConditionModel:
    """The untrained U-Net: 16x16x8 latents, attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 160, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # in this class: the number of heads
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: three layers, 160 wide."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction; trailing spacing, so that few steps start at pure noise."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def caption_layout(caption: str) -> torch.Tensor:
    """What a caption says of each shape, (24,): half its number, size (-1 small, 1 large), half of the picture (x, y).

    The half is -1 (left, upper), 1 (right, lower) or 0 (not stated): `sample_scene` places related pairs so.
    """
    stated, prompt = torch.zeros(len(SHAPES), _PER_SHAPE), parse_caption(caption)
    for spec in prompt.objects:
        row = stated[SHAPES.index(spec.shape)]
        row[0] += spec.count / 2
        row[1] = {"small": -1.0, "large": 1.0, None: 0.0}[spec.size]
    if prompt.relation:
        along, sign = RELATION_AXES[prompt.relation]
        for spec, side in zip(prompt.objects, (sign, -sign), strict=True):
            stated[SHAPES.index(spec.shape), 2 + along] = side
    return stated.flatten()


class LayoutReader(nn.Linear):
    """Reads `caption_layout` off every token, and is thrown away after training.

    A relation is a single word that turns the whole picture round, of which the denoiser's loss tells the text encoder
    little.
    """

    def __init__(self) -> None:
        super().__init__(TEXT_WIDTH, _PER_SHAPE * len(SHAPES))

    def loss(self, hidden: torch.Tensor, stated: torch.Tensor) -> torch.Tensor:
        """Squared error, summed over the numbers, of tokens (B, L, width); a token before the words has to guess."""
        return (self(hidden).float() - stated[:, None]).square().sum(-1).mean()


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (B, 32), padded and truncated as the pipeline does."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode_all(vae: AutoencoderTiny, pictures: torch.Tensor, path: Path, device: str) -> torch.Tensor:
    """Latents (N, 8, 16, 16) fp16 of all pictures, kept in ``path``."""
    if path.exists():
        return torch.load(path, weights_only=True)
    vae = vae.to(device, memory_format=torch.channels_last)
    chunks = []
    for chunk in pictures.split(256):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            chunks.append(vae.encoder(common.to_input(chunk, device) * 2 - 1).half().cpu())
    latents = torch.cat(chunks)
    torch.save(latents, path)
    return latents


def export(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, out: Path
) -> StableDiffusionPipeline:
    """Write the pipeline folder in fp16 around the autoencoder that is there."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(out / "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    # The files are fp16, but what loads them without being asked for a dtype should compute in float32
    # throughout: diffusers does so by itself, transformers follows this entry.
    common.edit_json(out / "text_encoder" / "config.json", dtype="float32")
    # AutoencoderTiny writes an entry that it then warns about when it reads it, and where it was loaded from.
    common.edit_json(out / "vae" / "config.json", block_out_channels=None, _name_or_path=None)
    return pipeline


def load_exported(folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
    """Copy the weights of a pipeline folder into the models."""
    unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32).state_dict())
    exported = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    text_encoder.load_state_dict(exported.state_dict())


def rows_of(category: str, captions: list[str]) -> torch.Tensor:
    """Rows whose caption belongs to ``category``; none for an empty name.

    Raises:
        ValueError: no such caption.
    """
    rows = [row for row, caption in enumerate(captions) if category and parse_caption(caption).category == category]
    if category and not rows:
        raise ValueError(f"no caption of category {category!r}; known: {', '.join(CATEGORIES)}")
    return torch.tensor(rows, dtype=torch.int64)


def sample_timesteps(number: int, generator: torch.Generator, early: torch.Tensor) -> torch.Tensor:
    """Training timesteps (number,): a share ``early`` uniform over the noisiest 150 of 1000, the rest Beta(1.8, 1.4).

    ``early`` (number,) is each row's own share.

    Below the noisiest sixth the layout shows through the noise, so that only there a caption's relation is worth
    anything to the loss; the Beta distribution, which alone comes there once in seven, favours what shapes are decided
    at. The decoder forgives what little noise is left below a tenth of the schedule.
    """
    uniform = torch.rand(number, generator=generator).double()
    middle = torch.from_numpy(beta.ppf(uniform.numpy(), 1.8, 1.4))
    chosen = torch.rand(number, generator=generator) < early
    return (1000 * torch.where(chosen, 0.85 + 0.15 * uniform, middle)).long().clamp(0, 999)


class TrainingSet:
    """Latents with their captions' tokens and what these tell; `draw` makes a step's batch of them."""

    def __init__(self, args: argparse.Namespace, tokenizer: CLIPTokenizer) -> None:
        data.prepare(args.work, seed=args.seed)
        pictures, captions = data.load(args.work)
        captions = captions[: args.pictures]
        vae = AutoencoderTiny.from_pretrained(args.out / "pipeline" / "vae", dtype=torch.float32)
        self.args = args
        self.latents = encode_all(vae, pictures[: args.pictures], args.work / "latents.pt", args.device)
        self.ids, self.empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
        self.stated = torch.stack([caption_layout(caption) for caption in captions])  # (N, 24)
        self.related = self.stated.view(len(captions), -1, _PER_SHAPE)[..., 2:].any(-1).any(-1)  # (N,) bool
        self.focused = rows_of(args.focus, captions)

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """``x0`` and noise (B, 8, 16, 16), timesteps (B,), token ids (B, 32) and stated layout (B, 24), on the device.

        A caption that is dropped for guidance's sake tells nothing.
        """
        args = self.args
        index = self._index(generator)
        x0 = self.latents[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        early = torch.where(self.related[index], args.early_related, args.early)
        timesteps = sample_timesteps(args.batch, generator, early)
        dropped = torch.rand(args.batch, 1, generator=generator) < args.dropout
        tokens = torch.where(dropped, self.empty, self.ids[index])
        stated = torch.where(dropped, 0.0, self.stated[index])
        return tuple(tensor.to(args.device) for tensor in (x0, noise, timesteps, tokens, stated))

    def _index(self, generator: torch.Generator) -> torch.Tensor:
        """Rows (B,) of a batch, a share of them from the category in focus."""
        args = self.args
        index = common.batch_indices(generator, len(self.latents), args.batch)
        if not len(self.focused):
            return index
        chosen = torch.rand(args.batch, generator=generator) < args.focus_share
        return torch.where(chosen, self.focused[common.batch_indices(generator, len(self.focused), args.batch)], index)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    return common.arguments(
        "world train diffusion",
        __doc__ or "",
        argv,
        steps=4200,
        batch=64,
        lr=8e-4,
        dropout=0.1,
        compile=1,
        pictures=60_000,
        warm_start=0,
        focus="",  # a category that lags behind ...
        focus_share=0.5,  # ... and how much of every batch it then gets
        layout=0.2,  # weight of reading the caption's layout off the text encoder
        early=0.1,  # share of timesteps from the noisiest part of the schedule ...
        early_related=0.5,  # ... and where the caption states a relation
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train and export; returns the exit status."""
    args, tokenizer = arguments(argv), build_tokenizer()
    scenes = TrainingSet(args, tokenizer)
    torch.manual_seed(args.seed)
    unet = build_unet().to(args.device, memory_format=torch.channels_last)
    text_encoder = build_text_encoder(tokenizer).to(args.device)
    if args.warm_start:  # go on from the exported weights, with a new optimiser and schedule
        load_exported(args.out / "pipeline", unet, text_encoder)
    reader = LayoutReader().to(args.device)
    ema_unet, ema_text = common.EMA(unet), common.EMA(text_encoder)
    modules = {"unet": unet, "text": text_encoder, "reader": reader}
    modules |= {"ema_unet": ema_unet.model, "ema_text": ema_text.model}
    loop = common.Loop("diffusion", args, modules, args.lr)
    alphas_cumprod = build_scheduler().alphas_cumprod.to(args.device)

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = text_encoder(tokens).last_hidden_state  # (B, 32, width)
        return unet(noisy, timesteps, hidden).sample, hidden

    if args.compile:  # a quarter faster on CPU, after two minutes of compiling
        predict = torch.compile(predict)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        x0, noise, timesteps, tokens, stated = scenes.draw(generator)
        alpha, sigma = alphas_cumprod[timesteps].sqrt(), (1 - alphas_cumprod[timesteps]).sqrt()
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        noisy = (alpha * x0 + sigma * noise).contiguous(memory_format=torch.channels_last)
        target = alpha * noise - sigma * x0  # v (Salimans & Ho 2022)
        predicted, hidden = predict(noisy, timesteps, tokens)
        denoising = F.mse_loss(predicted.float(), target)
        layout = reader.loss(hidden, stated)
        return {"loss": denoising + args.layout * layout, "denoising": denoising, "layout": layout}

    def after(step: int) -> None:
        ema_unet.update(step)
        ema_text.update(step)

    loop.run(loss_at, after)
    export(ema_unet.model, ema_text.model, tokenizer, args.out / "pipeline")
    print(f"diffusion: {loop.step} steps in {loop.seconds:.0f} s -> {args.out / 'pipeline'}")
    return 0
