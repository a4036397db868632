"""Flux.1 (Black Forest Labs 2024) in diffusers' folder layout: T5 + CLIP, packed latents, flow matching."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from addiff_env.diffusion.attention import capture_joint_attention
from addiff_env.diffusion.backbones.base import Backbone, compile_block, read_outputs, scheduler_settings
from addiff_env.diffusion.backbones.tokens import content_tokens, truncated_words
from addiff_env.diffusion.backbones.types import BackboneOptions, Conditioning, Prediction
from addiff_env.diffusion.samplers import Level, to_x0
from addiff_env.loading.isolation import frozen_call

_LAYERS = 4  # double-stream blocks whose attention is read, from the middle of the network on
_PATCH = 2  # latent cells per side of a token


class FluxBackbone(Backbone):
    """The parts of a `FluxPipeline`, called lane by lane.

    Flux.1-schnell takes no guidance; Flux.1-dev is distilled for it and takes the scale as an input, so
    that one evaluation is one pass either way. Latents stay (B, C, h, w) outside; they are packed here.

    Args:
        pipeline: the loaded pipeline (`open_pipeline`).
        options: their ``attention_stride`` must be 2, the side of Flux's tokens in latent cells.

    Raises:
        ValueError: another ``attention_stride``.
    """

    def __init__(self, pipeline: Any, options: BackboneOptions) -> None:
        super().__init__(options)
        if self.attention_stride != _PATCH:
            raise ValueError(f"attention_stride of Flux is {_PATCH}, its tokens' side; got {self.attention_stride}")
        modules = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer, pipeline.vae)
        self.clip, self.t5, self.transformer, self.vae = map(self._frozen, modules)
        if options.channels_last:
            self.vae = self.vae.to(memory_format=torch.channels_last)
        self.clip_tokenizer, self.tokenizer = pipeline.tokenizer, pipeline.tokenizer_2
        # The pipeline's own limits: schnell was distilled with 256 tokens, dev with 512.
        self.max_tokens = 512 if self.transformer.config.guidance_embeds else 256
        self.scheduler_config, self.solver = scheduler_settings(pipeline.scheduler), "euler"
        self.prediction_type = "flow_prediction"
        self.latent_channels = self.transformer.config.in_channels // _PATCH**2
        self.spatial_factor = pipeline.vae_scale_factor
        self.size_multiple = self.spatial_factor * _PATCH
        self.feature_width = self.transformer.inner_dim
        depth = len(self.transformer.transformer_blocks)
        first = depth // 2
        number = min(_LAYERS, depth - first)
        self._attention_layers = [first + i * (depth - first) // number for i in range(number)]
        if options.compile:
            for block in self.transformer.single_transformer_blocks:  # attention is captured in the others
                compile_block(block)
            compile_block(self.vae.decoder)
        self._attach_offload(self.clip, self.t5, self.transformer, self.vae)

    def image_tokens(self, shape: tuple[int, int, int]) -> int:
        """Sequence length of the picture: a token per 2x2 latent cells."""
        return (shape[1] // _PATCH) * (shape[2] // _PATCH)

    def passes(self, guidance_scale: float) -> int:
        """One: there is no unconditional pass."""
        return 1

    # ----------------------------------------------------------------- text

    @torch.no_grad()
    def _encode(self, text: str) -> Conditioning:
        if dropped := truncated_words(self.tokenizer, text, self.max_tokens):
            self._warn_once(f"prompt truncated to {self.max_tokens} tokens, dropped: {dropped!r}")
        content = content_tokens(self.tokenizer, self._t5_ids(text)[0]).to(self.device)
        embeddings, pooled = self._embed(text)
        return Conditioning(embeddings, content, pooled=pooled)

    def _t5_ids(self, prompt: str) -> torch.Tensor:
        return self.tokenizer(
            prompt, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids

    def _embed(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's token embeddings (tokens, width) and CLIP's pooled one (width,)."""
        limit = self.clip_tokenizer.model_max_length
        ids = self.clip_tokenizer(
            prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        pooled = self.clip(ids.to(self.device)).pooler_output[0]
        return self.t5(self._t5_ids(prompt).to(self.device))[0][0], pooled.to(self.dtype)

    # ----------------------------------------------------------------- denoiser

    @frozen_call
    def predict(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        level: Level,
        conditioning: Conditioning,
        guidance_scale: float,
        capture: bool = True,
    ) -> Prediction:
        """Evaluate the transformer for lanes (B, C, h, w), each at its own ``timesteps`` (B,) and ``level``.

        The maps are of image queries on text keys, normalised over the text. Without ``capture`` they have no tokens.
        """
        lanes, _, height, width = latents.shape
        side = (height // _PATCH, width // _PATCH)
        layers, middle = self._attention_layers if capture else [], self.transformer.transformer_blocks[-1]
        with (
            read_outputs(middle, lambda output: output[1].float().mean(1)) as features,
            capture_joint_attention(self.transformer, layers) as record,
        ):
            output = self.transformer(**self._inputs(latents, timesteps, conditioning, guidance_scale)).sample
        x0 = to_x0(unpack_latents(output, height, width), latents, level, self.prediction_type)
        maps = record.maps(*side) if capture else torch.zeros(lanes, 0, *side, device=latents.device)
        return Prediction(x0, maps, features[0])

    def _inputs(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> dict[str, Any]:
        rows, columns = (cells // _PATCH for cells in latents.shape[2:])
        places = torch.zeros(rows, columns, 3, device=self.device, dtype=self.dtype)
        places[..., 1] += torch.arange(rows, device=self.device)[:, None]
        places[..., 2] += torch.arange(columns, device=self.device)
        scale = torch.full((len(latents),), guidance_scale, device=self.device, dtype=torch.float32)
        return {
            "hidden_states": pack_latents(latents),
            "timestep": timesteps.to(latents.dtype) / 1000,
            "guidance": scale if self.transformer.config.guidance_embeds else None,
            "pooled_projections": conditioning.pooled,
            "encoder_hidden_states": conditioning.embeddings,
            "txt_ids": torch.zeros(conditioning.embeddings.shape[1], 3, device=self.device, dtype=self.dtype),
            "img_ids": places.flatten(0, 1),
        }

    # ----------------------------------------------------------------- pictures

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        shifted = (latents / config.scaling_factor + (config.get("shift_factor") or 0.0)).to(self.vae.dtype)
        pictures = self.vae.decode(shifted, return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        out = self.vae.encode((pictures * 2 - 1).to(self.device, self.vae.dtype))
        latents = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        return ((latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor).to(self.dtype)

    # ----------------------------------------------------------------- cost

    def _one_lane(self, component: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        latents = torch.zeros(1, *shape, device=self.device, dtype=self.dtype)
        if component == "text":
            return lambda: self._embed("")
        if component == "decode":
            return lambda: self.decode(latents)
        if component == "denoiser":
            timesteps = torch.ones(1, device=self.device, dtype=torch.float64)
            inputs = self._inputs(latents, timesteps, self.encode_prompts([""]), 1.0)
            return lambda: self.transformer(**inputs)
        raise ValueError(f"unknown component {component!r}; known: denoiser, decode, text")


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) to tokens (B, h/2 * w/2, 4C), row by row; a token holds channels, then the 2x2 cells."""
    return torch.nn.functional.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)


def unpack_latents(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of `pack_latents`: tokens (B, h/2 * w/2, 4C) to latents (B, C, h, w)."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // _PATCH, width // _PATCH))
    return torch.nn.functional.pixel_shuffle(grid, _PATCH)
