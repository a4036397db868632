"""Small pipelines with random weights, in the real folder layouts: what SD, SDXL and Flux tests run on."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import addiff_env
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

DDIM = {**BETAS, "clip_sample": False, "steps_offset": 1}  # SD's pipeline insists on this offset


def clip_text(width: int, with_projection: bool = False) -> torch.nn.Module:
    tokenizer = build_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def autoencoder(**more: Any) -> AutoencoderKL:
    """Four times smaller latents of four channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(block_out_channels=(8, 8, 16), latent_channels=4, norm_num_groups=4, **blocks, **more)


def unet(cross_attention_dim: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=8,
        **more,
    )


# What a network says of unit Gaussian latents x at high noise, as a multiple of x: epsilon is nearly all of x (a little
# less here, which leaves latents of unit size at the end), v nothing of it.
GAINS = {"epsilon": 0.93, "v_prediction": 0.0, "sample": 1.0}


@torch.no_grad()
def denoiser_like(model: UNet2DConditionModel, prediction_type: str) -> UNet2DConditionModel:
    """Let ``model`` answer ``GAINS`` times its normalised input, plus an eighth of what its random weights say.

    Half of its outermost channels carry x and -x past everything else, which SiLU(x) - SiLU(-x) = x adds up again.
    Random weights alone would let latents grow fifteenfold on their way down an epsilon schedule, and float32's last
    digits with them: on the scale of ordinary latents nothing could be told from rounding.
    """
    size = model.config.block_out_channels[0]
    last, carried = model.up_blocks[-1].resnets[-1], 2 * model.config.in_channels
    for layer in (model.conv_in, last.conv_shortcut, last.conv2):
        layer.weight[:carried], layer.bias[:carried] = 0, 0
    model.conv_out.weight /= 8
    model.conv_out.weight[:, :carried] = 0
    for channel in range(carried):
        latent, sign = channel // 2, 1 - 2 * (channel % 2)
        model.conv_in.weight[channel, latent, 1, 1] = sign
        last.conv_shortcut.weight[channel, size + channel] = 1  # the skip connection comes second
        model.conv_out.weight[latent, channel, 1, 1] = sign * GAINS[prediction_type]
    return model


def build_sd(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    denoiser = denoiser_like(unet(32), prediction_type)
    parts = {"vae": autoencoder(), "text_encoder": clip_text(32), "tokenizer": build_tokenizer(), "unet": denoiser}
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = DDIMScheduler(**DDIM, prediction_type=prediction_type)
    return StableDiffusionPipeline(**parts, scheduler=scheduler, **extra)


def build_sdxl(force_zeros: bool = True) -> StableDiffusionXLPipeline:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    denoiser = unet(64, projection_class_embeddings_input_dim=40 + 6 * 8, **added)
    return StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=True, scaling_factor=0.13025),
        text_encoder=clip_text(24),
        text_encoder_2=clip_text(40, with_projection=True),
        tokenizer=build_tokenizer(),
        tokenizer_2=build_tokenizer(),
        unet=denoiser_like(denoiser, "epsilon"),
        scheduler=DDIMScheduler(**DDIM),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


def build_flux(guidance_embeds: bool = False) -> FluxPipeline:
    tokenizer = build_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_text(32),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=build_tokenizer(),
        transformer=transformer,
    )


BUILDERS = {"sd": build_sd, "sdxl": build_sdxl, "flux": build_flux}


def save(kind: str, folder: Path, **options: Any) -> Path:
    """Build a pipeline with seeded weights and write it to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BUILDERS[kind](**options).save_pretrained(folder)
    return folder


def with_scheduler(folder: Path, scheduler: Any, target: Path) -> Path:
    """The pipeline of ``folder`` with another scheduler: everything else is linked."""
    target.mkdir()
    for part in folder.iterdir():
        if part.is_dir() and part.name != "scheduler":
            (target / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (target / "model_index.json").write_text(json.dumps(index))
    scheduler.save_pretrained(target / "scheduler")
    return target


def head(file: Path) -> Path:
    """A head of the aesthetic predictor's for the packaged CLIP."""
    from safetensors.torch import save_file

    from addiff_env.loading.paths import resolve_model
    from addiff_env.perception.encoders import load_clip
    from addiff_env.perception.scorers import Aesthetic

    with torch.random.fork_rng():
        made = Aesthetic(load_clip(resolve_model(addiff_env.TINY["clip"]), "cpu"))
    save_file({name: value for name, value in made.state_dict().items() if "encoder" not in name}, file)
    return file


def thrifty_agent(kwargs: dict[str, Any], price_range: tuple[float, float] = (0.001, 0.016), seed: int = 0) -> Any:
    """An agent that stops at once where evaluations are dear, and always goes on where they are cheap."""
    from addiff_env.agent import Agent, PolicyNet

    parts = {"clip_image": 128, "clip_text": 128, "timestep": 128, "price": 1, "quality": 8}
    net = PolicyNet(parts, 4)
    with torch.no_grad():
        for layer in (net.body[0], net.body[2], net.head):
            layer.weight.zero_()
            layer.bias.zero_()
        net.body[0].weight[0, sum(parts.values()) - 9] = 9.0
        net.body[2].weight[0, 0] = 9.0
        net.head.weight[0, 0], net.head.weight[1, 0] = -9.0 - seed, 9.0
    kwargs = {name: value for name, value in kwargs.items() if name != "prompts"} | {"price_range": list(price_range)}
    env = {"id": "AdDiffusion-Tiny-v0", "kwargs": kwargs}
    return Agent(net, {"env": env, "observation": parts, "hidden": 4, "training": {"seed": seed}})
