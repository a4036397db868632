"""Stable Diffusion in diffusers' folder layout: SD 1.5, its fine-tunes, and the embedded world's model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from addiff_env.attention import capture_cross_attention, cross_attention_layers
from addiff_env.backbones.base import Conditioning, Prediction
from addiff_env.loading import DTYPES, quiet_loading, resolve_dtype, resolve_model
from addiff_env.samplers import to_x0


def _load_pipeline(model: str, revision: str | None, dtype: torch.dtype) -> StableDiffusionPipeline:
    folder = resolve_model(model)
    try:
        # The safety checker replaces pictures by black ones, which an agent must not be rewarded or blamed for.
        with quiet_loading():
            return StableDiffusionPipeline.from_pretrained(
                folder, revision=revision, dtype=dtype, safety_checker=None, requires_safety_checker=False
            )
    except Exception as error:
        where = f"folder {folder}" if Path(folder).exists() else f"model {model!r} (not a local folder, nor loadable)"
        hint = "retrain it with: make tiny" if folder != model else "download it, or pass model=<pipeline folder>"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) or not Path(folder).exists() else ValueError
        raise kind(f"cannot load a StableDiffusionPipeline from {where}: {error}; {hint}") from error


class StableDiffusionBackbone:
    """A `StableDiffusionPipeline`'s parts, called lane by lane.

    Args:
        model: Hub id, local folder, or ``addiff_env:<path>`` for a packaged folder.
        revision: Hub revision; None is the default branch.
        device: where the networks live.
        dtype: ``float32``, ``float16``, ``bfloat16``, of weights and latents, or ``auto`` (`resolve_dtype`).
        attention_stride: latent cells per attention cell, of the layers whose cross-attention is read.

    Raises:
        FileNotFoundError: the model is not there; the message says how to get it.
        ValueError: a weight file is damaged, or ``dtype`` is unknown.
    """

    def __init__(
        self, model: str, revision: str | None = None, device: str = "cpu", dtype: str = "float32", attention_stride=4
    ) -> None:
        dtype = resolve_dtype(dtype, device)
        pipeline = _load_pipeline(model, revision, DTYPES[dtype])
        self.name, self.revision = model, revision
        self.device, self.dtype, self.dtype_name = torch.device(device), DTYPES[dtype], dtype
        self.tokenizer = pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder.to(device).eval().requires_grad_(False)
        self.unet = pipeline.unet.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.vae = pipeline.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.scheduler_config = dict(pipeline.scheduler.config)
        self.latent_channels = self.unet.config.in_channels
        self.spatial_factor = pipeline.vae_scale_factor
        self.feature_width = self.unet.config.block_out_channels[-1]
        self.attention_stride = attention_stride
        self._attention_layers = cross_attention_layers(self.unet, self._blocks_at(attention_stride))
        self._prompt_cache: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._warned: set[str] = set()
        self._flops: dict[tuple[Any, ...], float] = {}

    def _blocks_at(self, stride: int) -> tuple[str, ...]:
        """The down and up blocks whose attention runs at 1/stride of the latents' side."""
        depth = len(self.unet.config.block_out_channels)
        level = stride.bit_length() - 1  # each down block but the last halves the side after its layers
        if 2**level != stride or level >= depth:
            raise ValueError(f"attention_stride must be a power of 2 below {2**depth}, got {stride}")
        return (f"down_blocks.{level}", f"up_blocks.{depth - 1 - level}")

    # ----------------------------------------------------------------- text

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Encode ``prompts`` as the pipeline does: padded, truncated (warned once), last hidden state."""
        rows = [self._encode(prompt) for prompt in prompts]
        negative = self._encode("")[0]
        return Conditioning(
            torch.stack([row[0] for row in rows]),
            negative.expand(len(rows), -1, -1).clone(),
            torch.stack([row[1] for row in rows]),
        )

    @torch.no_grad()
    def _encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        if prompt not in self._prompt_cache:
            if len(self._prompt_cache) > 4096:  # bounded; prompts repeat within an evaluation, not for ever
                self._prompt_cache.clear()
            limit = self.tokenizer.model_max_length
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            ).input_ids
            self._warn_about(prompt, limit)
            embeddings = self.text_encoder(tokens.to(self.device)).last_hidden_state[0]
            self._prompt_cache[prompt] = embeddings, self._content(tokens[0]).to(self.device)
        return self._prompt_cache[prompt]

    def _content(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens are the prompt's own; an empty prompt keeps its end token, so that maps exist."""
        special = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        content = torch.tensor([int(token) not in special for token in tokens])
        if not content.any():
            content[1] = True
        return content

    def _warn_about(self, prompt: str, limit: int) -> None:
        pieces = self.tokenizer.tokenize(prompt)
        if len(pieces) > limit - 2:
            dropped = self.tokenizer.convert_tokens_to_string(pieces[limit - 2 :]).replace("</w>", " ").strip()
            self._warn_once(f"prompt truncated to {limit} tokens, dropped: {dropped!r}")
        unknown = [w for w in re.findall(r"[^\W\d_]{2,}", prompt) if _is_spelled_out(self._pieces(w))]
        for word in unknown:
            self._warn_once(f"the tokenizer does not know the word {word!r}; it is spelled out letter by letter")

    def _pieces(self, word: str) -> list[str]:
        return self.tokenizer.tokenize(word)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    # ----------------------------------------------------------------- denoiser

    @torch.no_grad()
    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        capture: bool = True,
    ) -> Prediction:
        """Evaluate the U-Net for lanes (B, C, h, w), each at its own ``timesteps`` (B,) int64.

        ``alphas_cumprod`` (B,) float64 are the signal powers there. With ``guidance_scale`` above 1,
        classifier-free guidance (Ho & Salimans 2022) costs a second pass. Without ``capture`` no
        attention is recorded and ``maps`` is empty.
        """
        lanes, guided = len(latents), guidance_scale > 1
        context = conditioning.embeddings
        if guided:
            context = torch.cat([conditioning.negative, context])
        repeat = 2 if guided else 1
        inputs = latents.repeat(repeat, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        conditional = slice(lanes * (repeat - 1), lanes * repeat)
        features: list[torch.Tensor] = []
        hook = self.unet.mid_block.register_forward_hook(
            lambda module, args, output: features.append(output[conditional].float().mean((2, 3)))
        )
        try:
            layers = self._attention_layers if capture else []
            with capture_cross_attention(self.unet, layers, conditional) as record:
                output = self.unet(inputs, timesteps.repeat(repeat), encoder_hidden_states=context).sample
        finally:
            hook.remove()
        if guided:
            unconditional, text = output.chunk(2)
            output = unconditional + guidance_scale * (text - unconditional)
        x0 = to_x0(output, latents, alphas_cumprod, self.scheduler_config["prediction_type"])
        side = (latents.shape[2] // self.attention_stride, latents.shape[3] // self.attention_stride)
        maps = record.maps(*side) if capture else torch.zeros(lanes, 0, *side, device=latents.device)
        return Prediction(x0, maps, features[0])

    # ----------------------------------------------------------------- pictures

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents (B, C, h, w) to pictures (B, 3, H, W) float32 in [0, 1]."""
        scaled = latents / self.vae.config.scaling_factor
        pictures = self.vae.decode(scaled.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    # ----------------------------------------------------------------- cost

    def flops(self, component: str, latents_shape: tuple[int, ...]) -> float:
        """FLOPs per lane of ``denoiser`` (one pass), ``decode`` or ``text``; measured once per shape (C, h, w)."""
        key = (component, latents_shape)
        if key not in self._flops:
            self._flops[key] = count_flops(self._one_lane(component, latents_shape))
        return self._flops[key]

    def _one_lane(self, component: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        latents = torch.zeros(1, *shape, device=self.device, dtype=self.dtype)
        ids = torch.zeros(1, self.tokenizer.model_max_length, dtype=torch.int64, device=self.device)
        if component == "text":
            return lambda: self.text_encoder(ids)
        if component == "decode":
            return lambda: self.decode(latents)
        if component == "denoiser":
            context = self._encode("")[0][None]
            return lambda: self.unet(latents, 0, encoder_hidden_states=context)
        raise ValueError(f"unknown component {component!r}; known: denoiser, decode, text")


def _is_spelled_out(pieces: list[str]) -> bool:
    """At least half of a word's pieces are single letters."""
    return 2 * sum(len(piece.removesuffix("</w>")) == 1 for piece in pieces) >= len(pieces)


@torch.no_grad()
def count_flops(call: Callable[[], Any]) -> float:
    """FLOPs of one call, by `torch.utils.flop_counter` (matrix products and convolutions)."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
