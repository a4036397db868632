"""Stable Diffusion in diffusers' folder layout: SD 1.5, SDXL, their fine-tunes, and the embedded world's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from addiff_env.diffusion.attention import capture_cross_attention, cross_attention_layers
from addiff_env.diffusion.backbones.base import Backbone, compile_block, guide, read_outputs, scheduler_settings
from addiff_env.diffusion.backbones.tokens import content_tokens, spelled_out_words, truncated_words
from addiff_env.diffusion.backbones.types import BackboneOptions, Conditioning, Prediction
from addiff_env.diffusion.samplers import Level, to_x0
from addiff_env.loading.isolation import frozen_call

_LAYERS = 6  # most attention layers looked at, evenly chosen: SDXL has fifty at one resolution


class StableDiffusionBackbone(Backbone):
    """The parts of a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`, called lane by lane.

    Args:
        pipeline: the loaded pipeline (`open_pipeline`).
        options: how its networks are held and run.

    Raises:
        ValueError: no attention runs at ``attention_stride``.
    """

    def __init__(self, pipeline: Any, options: BackboneOptions) -> None:
        super().__init__(options)
        self.is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
        self._sizes: dict[tuple[int, int], torch.Tensor] = {}
        self._channels: torch.Tensor | None = None
        names = ("tokenizer", "tokenizer_2") if self.is_xl else ("tokenizer",)
        self.tokenizers = [t for t in (getattr(pipeline, n) for n in names) if t is not None]
        self.tokenizer = self.tokenizers[0]
        names = ("text_encoder", "text_encoder_2") if self.is_xl else ("text_encoder",)
        self.text_encoders = [self._frozen(m) for m in (getattr(pipeline, n) for n in names) if m is not None]
        self._format = torch.channels_last if options.channels_last else torch.contiguous_format
        self.unet, self.vae = (self._frozen(m).to(memory_format=self._format) for m in (pipeline.unet, pipeline.vae))
        # SDXL's decoder overflows in float16. Others' are as diffusers runs them: where a file lacks the flag,
        # AutoencoderKL fills in that of SDXL, which the pipelines of other models do not look at.
        if self.is_xl and self.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae = self.vae.float()
        self._zero_negative = self.is_xl and bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        self.encodes_negative = not self._zero_negative
        self._zeros: Conditioning | None = None
        self.scheduler_config, self.solver = scheduler_settings(pipeline.scheduler), "ddim"
        self.prediction_type = self.scheduler_config.get("prediction_type", "epsilon")
        self.latent_channels = self.unet.config.in_channels
        self.spatial_factor = self.size_multiple = pipeline.vae_scale_factor
        self.feature_width = self.unet.config.block_out_channels[-1]
        layers = cross_attention_layers(self.unet, self._blocks_at(self.attention_stride))
        number = min(_LAYERS, len(layers))
        self._attention_layers = [layers[i * len(layers) // number] for i in range(number)]
        if options.compile:
            self._compile()
        self._attach_offload(*self.text_encoders, self.unet, self.vae)

    @property
    def text_encoder(self) -> Any:
        """The (first) text encoder."""
        return self.text_encoders[0]

    def _blocks_at(self, stride: int) -> tuple[str, ...]:
        """The down and up blocks whose attention runs at 1/stride of the latents' side."""
        depth = len(self.unet.config.block_out_channels)
        level = stride.bit_length() - 1  # each down block but the last halves the side after its layers
        if 2**level != stride or level >= depth:
            raise ValueError(f"attention_stride must be a power of 2 below {2**depth}, got {stride}")
        return (f"down_blocks.{level}", f"up_blocks.{depth - 1 - level}")

    def _compile(self) -> None:
        """Compile block by block: blocks of one shape share their kernels, and attention stays open to capture."""
        for module in self.unet.modules():
            if type(module).__name__ == "ResnetBlock2D":
                compile_block(module)
        compile_block(self.vae.decoder)

    def passes(self, guidance_scale: float) -> int:
        """Two with classifier-free guidance (a scale above 1), else one."""
        return 2 if guidance_scale > 1 else 1

    # ----------------------------------------------------------------- text

    @torch.no_grad()
    def _encode(self, text: str) -> Conditioning:
        """Padded, truncated (warned once); SD takes the last hidden state, SDXL both encoders' last but one."""
        limit = self.tokenizer.model_max_length
        if dropped := truncated_words(self.tokenizer, text, limit):
            self._warn_once(f"prompt truncated to {limit} tokens, dropped: {dropped!r}")
        for word in spelled_out_words(self.tokenizer, text):
            self._warn_once(f"the tokenizer does not know the word {word!r}; it is spelled out letter by letter")
        ids = self._ids(self.tokenizer, text)
        content = content_tokens(self.tokenizer, ids[0]).to(self.device)
        embeddings, pooled = self._embed(text, ids)
        return Conditioning(embeddings, content, pooled=pooled)

    def _negative(self, text: str | None, prompt: Conditioning) -> Conditioning:
        """The text's encoding; without one that of the empty prompt, or zeros where SDXL's pipeline has them."""
        if text is not None or not self._zero_negative:
            return self._encoded(text or "")
        if self._zeros is None:  # all encodings have one shape
            pooled = None if prompt.pooled is None else torch.zeros_like(prompt.pooled)
            self._zeros = Conditioning(torch.zeros_like(prompt.embeddings), prompt.content, pooled=pooled)
        return self._zeros

    def _ids(self, tokenizer: Any, prompt: str) -> torch.Tensor:
        limit = tokenizer.model_max_length
        return tokenizer(prompt, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids

    def _embed(self, prompt: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Token embeddings (tokens, width) and, of SDXL, the pooled one (width,); ``ids`` by the first tokenizer."""
        if not self.is_xl:
            return self.text_encoder(ids.to(self.device)).last_hidden_state[0], None
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            own = ids if tokenizer is self.tokenizer else self._ids(tokenizer, prompt)
            out = encoder(own.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2][0])
            if pooled is None and out[0].ndim == 2:
                pooled = out[0][0]
        return torch.cat(states, dim=-1), pooled

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
        """Evaluate the U-Net for lanes (B, C, h, w), each at its own ``timesteps`` (B,) and ``level``.

        With ``guidance_scale`` above 1, classifier-free guidance (Ho & Salimans 2022) costs a second
        pass. Without ``capture`` no attention is recorded and the maps have no tokens.
        """
        lanes, repeat = len(latents), self.passes(guidance_scale)
        inputs = latents.repeat(repeat, 1, 1, 1).contiguous(memory_format=self._format)
        conditional = slice(lanes * (repeat - 1), lanes * repeat)
        layers = self._attention_layers if capture else []
        context = self._context(conditioning, repeat == 2, latents.shape)
        with (
            read_outputs(self.unet.mid_block, lambda output: output[conditional].float().mean((2, 3))) as features,
            capture_cross_attention(self.unet, layers, conditional) as record,
        ):
            output = self.unet(inputs, timesteps.repeat(repeat), **context).sample
        output = guide(output, guidance_scale) if repeat == 2 else output
        x0 = to_x0(output, latents, level, self.prediction_type)
        side = [-(-cells // self.attention_stride) for cells in latents.shape[2:]]
        maps = record.maps(side[0], side[1]) if capture else torch.zeros(lanes, 0, *side, device=latents.device)
        return Prediction(x0, maps, features[0])

    def _context(self, conditioning: Conditioning, guided: bool, shape: torch.Size) -> dict[str, Any]:
        """The U-Net's text arguments for one batch, the unconditional half first."""
        context, pooled = conditioning.embeddings, conditioning.pooled
        if guided:
            assert conditioning.negative is not None
            context = torch.cat([conditioning.negative, context])
        if pooled is None:
            return {"encoder_hidden_states": context}
        if guided:
            assert conditioning.negative_pooled is not None
            pooled = torch.cat([conditioning.negative_pooled, pooled])
        added = {"text_embeds": pooled, "time_ids": self._time_ids(shape).expand(len(context), -1)}
        return {"encoder_hidden_states": context, "added_cond_kwargs": added}

    def _time_ids(self, shape: torch.Size) -> torch.Tensor:
        """What SDXL is told of the picture's size and crop (6,) (Podell et al. 2024, section 2.2); sent once a size."""
        height, width = (cells * self.spatial_factor for cells in shape[2:])
        if (height, width) not in self._sizes:
            sizes = [height, width, 0, 0, height, width]
            self._sizes[height, width] = torch.tensor(sizes, device=self.device, dtype=self.dtype)
        return self._sizes[height, width]

    # ----------------------------------------------------------------- pictures

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics()
        scaled = (latents * std / self.vae.config.scaling_factor + mean).to(self.vae.dtype)
        pictures = self.vae.decode(scaled.contiguous(memory_format=self._format), return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        out = self.vae.encode((pictures * 2 - 1).to(self.device, self.vae.dtype))
        latents = out.latent_dist.mean if hasattr(out, "latent_dist") else out.latents
        mean, std = self._statistics()
        return ((latents.to(self.dtype) - mean) * self.vae.config.scaling_factor / std).to(self.dtype)

    def _statistics(self) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Per-channel mean and standard deviation that some fine-tunes' autoencoders carry (1, C, 1, 1)."""
        mean, std = (self.vae.config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return 0.0, 1.0
        if self._channels is None:  # sent once
            self._channels = torch.tensor([mean, std], device=self.device, dtype=self.dtype)[:, None, :, None, None]
        return self._channels[0], self._channels[1]

    # ----------------------------------------------------------------- cost

    def _one_lane(self, component: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        latents = torch.zeros(1, *shape, device=self.device, dtype=self.dtype)
        if component == "text":
            return lambda: self._embed("", self._ids(self.tokenizer, ""))
        if component == "decode":
            return lambda: self.decode(latents)
        if component == "denoiser":
            context = self._context(self.encode_prompts([""]), False, latents.shape)
            return lambda: self.unet(latents, 0, **context)
        raise ValueError(f"unknown component {component!r}; known: denoiser, decode, text")
