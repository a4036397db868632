"""SD 1.5's full-size layout with random weights: what fits on a laptop, and how long an action takes there."""

import gzip
import json
import resource
import time
from importlib import resources
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Dinov2Config, Dinov2Model

import addiff_env
from addiff_env.env import DiffusionDenoiseEnv

pytestmark = pytest.mark.slow
CONTINUE, STOP, REFINE = range(3)
LONG = "a photograph of an astronaut riding a horse " * 12


def clip_tokenizer() -> CLIPTokenizer:
    """The real CLIP vocabulary (49,408 tokens), from the copy that open_clip carries."""
    pytest.importorskip("open_clip")
    path = resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # CLIP's order of the bytes
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    assert set(symbols) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *[s + "</w>" for s in symbols], *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def filled(build: Any) -> Any:
    """A model with small random bfloat16 weights, without a float32 copy on the way."""
    with torch.device("meta"):
        model = build()
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point():
            value.data.normal_(0, 0.02, generator=generator)
        elif "position_ids" in name:
            value.data.copy_(torch.arange(value.shape[-1]))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5's own configurations; about 2.1 GB on disk."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768, eos_token_id=49407
    )
    vae = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    channels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=filled(lambda: AutoencoderKL(**vae, **channels)),
        text_encoder=filled(lambda: CLIPTextModel(text)),
        tokenizer=clip_tokenizer(),
        unet=filled(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768)),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    root = tmp_path_factory.mktemp("sd15")
    pipeline.save_pretrained(root / "pipeline")
    AutoencoderTiny().save_pretrained(root / "taesd")
    Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)).save_pretrained(
        root / "dino"
    )
    clip = pytest.importorskip("open_clip").create_model("ViT-L-14", precision="bf16")
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, root / "clip.safetensors")
    return root


def test_tokenizer_is_clips() -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.tokenizer.SimpleTokenizer()
    for text in ("a red apple", "four cats left of three dogs", "naïve café, 12:30!"):
        ids = theirs([text])[0]
        ours = clip_tokenizer()(text, padding="max_length", max_length=77).input_ids
        assert ours[: int((ids > 0).sum())] == ids[ids > 0].tolist()


def test_an_episode_on_the_full_layout(folder: Path, tiny_kwargs: dict[str, Any], record_property: Any) -> None:
    """Reset, two continues, a refinement, a stop: 1672 numbers to see, ViT-L/14 included, in less than 24 GiB."""
    packaged = addiff_env.TINY | tiny_kwargs
    settings = {
        "model": str(folder / "pipeline"),
        "clip": f"open_clip:ViT-L-14@{folder / 'clip.safetensors'}",
        "dino": str(folder / "dino"),
        "scorer": packaged["scorer"],
        "preview_model": str(folder / "taesd"),
        "device": "cpu",
        "dtype": "bfloat16",
        "warmup_steps": 1,
        "render_mode": "rgb_array",
    }
    env = gym.make("AdDiffusion-SD15-v0", **settings)
    assert isinstance(env.unwrapped, DiffusionDenoiseEnv)
    assert env.observation_space.shape == (1672,)
    seconds = {}
    began = time.perf_counter()
    with pytest.warns(UserWarning, match="truncated to 77 tokens"):
        observation, info = env.reset(options={"prompt": LONG, "seed": 0})
    seconds["reset"] = time.perf_counter() - began
    for name, action in (("continue", CONTINUE), ("continue again", CONTINUE), ("refine", REFINE), ("stop", STOP)):
        assert env.observation_space.contains(observation)
        began = time.perf_counter()
        observation, reward, terminated, _, info = env.step(action)
        seconds[name] = time.perf_counter() - began
    assert terminated and info["nfe"] == 1 + 2 + 2 and not info["fault"]
    assert env.render().shape == (512, 512, 3)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    measured = {"seconds": {k: round(v, 1) for k, v in seconds.items()}, "peak_gib": round(gib, 1)}
    record_property("measured", json.dumps(measured))
    print(json.dumps(measured))
    assert gib < 24
    env.close()
