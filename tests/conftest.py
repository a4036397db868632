import os
import shutil

# Before anything heavy is imported: tests never reach the network and never open a window.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("addiff", deadline=None, derandomize=True, max_examples=200)
settings.load_profile("addiff")


# The files that take longest, begun first: otherwise one worker is left with them when the others have ended.
FIRST = ("test_training.py", "test_scripts.py", "test_search.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; skip tests marked ``gpu`` where there is no CUDA device."""
    items.sort(key=lambda item: item.path.name not in FIRST)  # stable: the rest stays in its order
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def tiny_kwargs() -> dict[str, Any]:
    """Where the embedded world's models are: in the package, or in the folder ``ADDIFF_TEST_WEIGHTS``.

    *Stop* has its plain meaning in the tests, whatever the preset says; those of ``finish_steps`` name it.
    """
    plain: dict[str, Any] = {"finish_steps": 0}
    folder = os.environ.get("ADDIFF_TEST_WEIGHTS")
    if not folder:
        return plain
    parts = {"model": "pipeline", "clip": "clip", "dino": "dino", "scorer": "reward"}
    return plain | {name: str(Path(folder, part)) for name, part in parts.items()}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder laid out like the embedded world's, with few and random weights: a millisecond a pass."""
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
        text_encoder = CLIPTextModel(text)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    folder = tmp_path_factory.mktemp("models") / "pipeline"
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_looks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a CLIP, a DINO and a scorer like the embedded world's, as wide, with few and random weights.

    A look of theirs takes a fraction of a millisecond instead of ten.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

    import addiff_env
    from addiff_env.loading.paths import resolve_model
    from addiff_env.perception.scorers.pixel_text import PixelTextReward

    packaged = {name: Path(resolve_model(addiff_env.TINY[name])) for name in ("clip", "dino", "scorer")}
    folders = {name: tmp_path_factory.mktemp("looks") / name for name in packaged}
    few: dict[str, Any] = {"num_hidden_layers": 1, "intermediate_size": 32}
    clip, dino = CLIPConfig.from_pretrained(packaged["clip"]), ViTConfig.from_pretrained(packaged["dino"])
    clip.text_config.update(few)
    clip.vision_config.update(few | {"patch_size": 16})
    dino.update(few | {"patch_size": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(clip).save_pretrained(folders["clip"])
        ViTModel(dino, add_pooling_layer=False).save_pretrained(folders["dino"])
        reward = PixelTextReward(clip.text_config.vocab_size, width=16, layers=1, heads=2, channels=(8, 8))
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(packaged["clip"] / name, folders["clip"])
    reward.save_pretrained(folders["scorer"], CLIPTokenizer.from_pretrained(packaged["scorer"]))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def small_verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small verifier of `small_model`'s latents, with random weights whose answers differ."""
    import torch

    from addiff_env.perception.scorers import LatentTextReward
    from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

    path, tokenizer = tmp_path_factory.mktemp("verifier"), build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LatentTextReward(len(tokenizer), MAX_LENGTH, width=16, layers=1, heads=2, channels=4, stem=8)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.config |= {"scale": 1.5, "bias": 0.25, "finished_bias": -0.5}
    model.save_pretrained(path, tokenizer)
    return path


@pytest.fixture(scope="session")
def small_kwargs(tiny_kwargs: dict[str, Any], small_looks: dict[str, str], small_model: Path) -> dict[str, Any]:
    """The embedded world on `small_model` and `small_looks`: short schedule, small budget."""
    return {
        **tiny_kwargs,
        **small_looks,
        "model": str(small_model),
        "dtype": "float32",
        "num_inference_steps": 6,
        "warmup_steps": 2,
        "max_nfe": 12,
    }
