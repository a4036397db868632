"""Encoders: preprocessing against the official processors, features against the libraries' own forward, bad input."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import addiff_env
from addiff_env.loading.paths import resolve_model
from addiff_env.perception import preprocessing
from addiff_env.perception.encoders import CLIPEncoder, ContrastiveEncoder, DINOEncoder, OpenCLIPEncoder, load_clip
from addiff_env.perception.preprocessing import (
    OPENAI_CLIP,
    RESIZES,
    Preprocess,
    check_pairs,
    check_pictures,
    resize_as_pillow,
    unvalidated_pictures,
)

SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SIZES = [(512, 512), (64, 64), (300, 224), (224, 301), (200, 517), (224, 224), (64, 97)]  # height, width


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with coarse shapes, edges and grain, uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((width, height), Image.NEAREST)
    return (np.asarray(coarse) + rng.normal(0, 10, (height, width, 3))).clip(0, 255).round().astype(np.uint8)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def small_clip() -> OpenCLIPEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OpenCLIPEncoder(open_clip.CLIP(**SMALL_CLIP), open_clip.get_tokenizer("ViT-B-32"))


@pytest.fixture(scope="module")
def packaged_clip() -> ContrastiveEncoder:
    return load_clip(resolve_model(addiff_env.TINY["clip"]), "cpu")


# ------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_are_those_of_open_clips_transform(resize_mode: str, height: int, width: int) -> None:
    picture = draw(height, width)
    mean, std = OPENAI_CLIP
    official = open_clip.image_transform(224, is_train=False, mean=mean, std=std, resize_mode=resize_mode)
    theirs = official(Image.fromarray(picture))[None]
    config = {"size": 224, "mean": mean, "std": std, "resize_mode": resize_mode}
    ours = Preprocess.of_open_clip(config)(as_tensor(picture))
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert float((ours - theirs).abs().max()) < 1e-5  # not one pixel is a grey level off


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_features_are_those_of_open_clips_transform(small_clip: OpenCLIPEncoder, height: int, width: int) -> None:
    picture = draw(height, width)
    official = open_clip.image_transform(224, is_train=False)
    with torch.no_grad():
        theirs = F.normalize(small_clip.model.encode_image(official(Image.fromarray(picture))[None]), dim=-1)
    ours = small_clip.image_features(as_tensor(picture))
    assert float((ours * theirs).sum()) >= 0.999
    other = small_clip.image_features(as_tensor(draw(height, width, seed=1)))
    assert float((other * theirs).sum()) < 0.999  # the features do tell pictures apart


@pytest.mark.parametrize(
    "processor",
    [
        transformers.BitImageProcessor(  # facebook/dinov2-small
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        transformers.ViTImageProcessor(  # facebook/dino-vits16
            size={"height": 224, "width": 224}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        ),
        transformers.CLIPImageProcessor(),
    ],
    ids=lambda processor: type(processor).__name__,
)
@pytest.mark.parametrize(("height", "width"), [(512, 512), (304, 226), (64, 64), (64, 97)])
def test_pixels_are_those_of_transformers_processors(processor: Any, height: int, width: int) -> None:
    picture = draw(height, width)
    theirs = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    ours = Preprocess.of_processor(processor)(as_tensor(picture))
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    assert float((ours - theirs).abs().max()) < 2.1 / 255 / min(processor.image_std)  # two grey levels


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "to"),
    [(512, 512, (224, 224)), (33, 17, (100, 224)), (64, 48, (64, 31)), (3, 2048, (3, 7)), (4, 9000, (3, 13))],
)
@pytest.mark.parametrize("devices", [("cpu",), ()])
def test_resampling_is_pillows(
    interpolation: str,
    height: int,
    width: int,
    to: tuple[int, int],
    devices: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preprocessing, "FAST_FLOAT64", devices)  # as on a GPU where there is none
    picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)  # overshoots often
    theirs = np.asarray(Image.fromarray(picture).resize(to[::-1], Image.Resampling[interpolation.upper()]))
    ours = (resize_as_pillow(as_tensor(picture), *to, interpolation)[0] * 255).round().byte()
    np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), theirs)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_resampling_is_exact_in_whatever_precision_is_allowed(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(0))
    strict, before = resize_as_pillow(pictures, 40, 32, "bicubic"), torch.get_float32_matmul_precision()
    monkeypatch.setattr(preprocessing, "FAST_FLOAT64", ())
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(resize_as_pillow(pictures, 40, 32, "bicubic"), strict)
    finally:
        torch.set_float32_matmul_precision(before)


@given(
    st.integers(1, 9),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.sampled_from(RESIZES),
    st.sampled_from(["bicubic", "bilinear"]),
    st.booleans(),
    st.integers(1, 4000),
)
@settings(max_examples=60)
def test_pictures_prepared_in_slices_are_those_of_one_batch(
    number: int, sides: tuple[int, int], resized: str, interpolation: str, eight_bit: bool, at_once: int
) -> None:
    pictures = torch.rand(number, 3, *sides, generator=torch.Generator().manual_seed(number))
    prepare = Preprocess(16, (0.5,) * 3, (0.3,) * 3, resized, None, interpolation, eight_bit)
    whole = prepare(pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocessing, "PIXELS_AT_ONCE", at_once)
        assert torch.equal(prepare(pictures), whole)


def test_bars_are_black_and_overshoot_is_kept_where_the_official_code_keeps_it() -> None:
    stripes = torch.zeros(1, 3, 40, 80)
    stripes[..., ::16] = 1
    pixels = Preprocess(224, (0.5,) * 3, (0.5,) * 3, resize="longest", eight_bit=False)(stripes)
    assert (pixels[:, :, :56] == -1).all() and (pixels[:, :, -56:] == -1).all()
    assert float(pixels.min()) < -1.01
    assert float(Preprocess(224, (0.5,) * 3, (0.5,) * 3, resize="longest")(stripes).min()) == -1


def test_a_processor_that_does_something_else_is_refused() -> None:
    for odd in (
        transformers.BitImageProcessor(size={"shortest_edge": 256}, do_center_crop=False),
        transformers.ViTImageProcessor(size={"height": 224, "width": 112}),
        transformers.ViTImageProcessor(resample=0),
    ):
        with pytest.raises(ValueError, match=type(odd).__name__):
            Preprocess.of_processor(odd)
    for name, value in (
        *((name, False) for name in ("do_normalize", "do_resize", "do_rescale")),
        *(("rescale_factor", factor) for factor in (1.0, 1 / 127.5)),
        ("do_pad", True),
    ):
        with pytest.raises(ValueError, match=f"CLIPImageProcessor.*with {name} {value}"):
            Preprocess.of_processor(transformers.CLIPImageProcessor(**{name: value}))
    assert Preprocess.of_processor(transformers.CLIPImageProcessor(rescale_factor=0.00392156862745098)).size == 224
    with pytest.raises(ValueError, match="224 x 112"):
        Preprocess.of_open_clip({"size": (224, 112)})
    with pytest.raises(ValueError, match="'stretch'"):
        Preprocess(224, (0.5,), (0.5,), resize="stretch")
    with pytest.raises(ValueError, match="'nearest'"):
        Preprocess(224, (0.5,), (0.5,), interpolation="nearest")


# ------------------------------------------------------------------ features


def test_open_clip_features_are_the_models_own(small_clip: OpenCLIPEncoder) -> None:
    pictures = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "two birds"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in OPENAI_CLIP)
    with torch.no_grad():
        image, text, _ = small_clip.model((pictures - mean) / std, open_clip.tokenize(prompts))
    assert torch.allclose(small_clip.image_features(pictures), image, atol=1e-6)
    assert torch.allclose(small_clip.text_features(prompts), text, atol=1e-6)
    assert torch.allclose(small_clip.similarity(pictures, prompts), (image * text).sum(1), atol=1e-6)
    assert (small_clip.size, small_clip.width, small_clip.mean) == (224, 48, OPENAI_CLIP[0])


def test_transformers_features_are_the_models_own(packaged_clip: ContrastiveEncoder) -> None:
    assert isinstance(packaged_clip, CLIPEncoder)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = packaged_clip.tokenizer(["a red circle", "a star"], padding="max_length", max_length=32)
    with torch.no_grad():
        theirs = packaged_clip.model(
            pixel_values=(pictures - 0.5) / 0.5,
            input_ids=torch.tensor(tokens.input_ids),
            attention_mask=torch.tensor(tokens.attention_mask),
        )
    assert torch.allclose(packaged_clip.image_features(pictures), theirs.image_embeds, atol=1e-6)
    assert torch.allclose(packaged_clip.text_features(["a red circle", "a star"]), theirs.text_embeds, atol=1e-6)


def test_texts_are_encoded_once(small_clip: OpenCLIPEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(small_clip, "_texts", {})
    monkeypatch.setattr(small_clip, "encode_text", lambda prompt: read.append(prompt) or torch.ones(48))
    small_clip.text_features(["a", "b", "a"])
    small_clip.text_features(["b", "c"])
    assert read == ["a", "b", "c"]
    monkeypatch.setattr("addiff_env.perception.encoders._CACHED_TEXTS", 2)
    assert small_clip.text_features(["a", "d", "e", "f", "a"]).shape == (5, 48)  # more than the cache holds


def test_an_overlong_text_is_cut(small_clip: OpenCLIPEncoder) -> None:
    assert torch.isfinite(small_clip.encode_text("a red circle and " * 60)).all()


def test_dinov2_resizes_crops_and_interpolates_its_positions(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(tmp_path)
    encoder = DINOEncoder(str(tmp_path))
    assert (encoder.size, encoder.width, encoder.preprocess.edge) == (224, 32, 256)
    picture = draw(300, 400)
    # By hand: 37 x 37 trained positions, bicubically resampled to 16 x 16, given to a model that needs no resampling.
    positions = model.embeddings.position_embeddings.detach()
    grid = positions[:, 1:].reshape(1, 37, 37, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", align_corners=False)
    state = model.state_dict() | {
        "embeddings.position_embeddings": torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)
    }
    plain = transformers.Dinov2Model(transformers.Dinov2Config(**config.to_dict() | {"image_size": 224})).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        pixels = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
        theirs = F.normalize(plain(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    assert float((encoder.image_features(as_tensor(picture)) * theirs).sum()) > 0.9999


def test_the_packaged_dino_keeps_its_square_input() -> None:
    encoder = DINOEncoder(resolve_model(addiff_env.TINY["dino"]))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        theirs = encoder.model(pixel_values=(pictures - mean) / std).last_hidden_state[:, 0]
    assert torch.allclose(encoder.image_features(pictures), F.normalize(theirs, dim=-1), atol=1e-6)
    assert encoder.image_features(torch.rand(1, 3, 48, 96)).shape == (1, encoder.width)


# ------------------------------------------------------------------ settings, damaged files


@pytest.fixture(scope="module")
def open_clip_folder(small_clip: OpenCLIPEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    )
    save_file(small_clip.model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_a_local_open_clip_folder(open_clip_folder: Path, small_clip: OpenCLIPEncoder) -> None:
    encoder = load_clip(f"open_clip:local-dir:{open_clip_folder}", "cpu")
    assert encoder.mean == (0.5, 0.5, 0.5) and encoder.std == (0.25, 0.25, 0.25)
    assert torch.allclose(encoder.encode_text("a star"), small_clip.encode_text("a star"), atol=1e-6)
    assert load_clip(f"open_clip:local-dir:{open_clip_folder}", "cpu") is encoder


def test_a_local_checkpoint_of_a_known_architecture(
    small_clip: OpenCLIPEncoder, open_clip_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "small-clip-of-a-test.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path)
    weights = open_clip_folder / "open_clip_model.safetensors"
    encoder = load_clip(f"open_clip:small-clip-of-a-test@{weights}", "cpu")
    assert torch.allclose(encoder.encode_text("a star"), small_clip.encode_text("a star"), atol=1e-6)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut.safetensors.*damaged"):
        load_clip(f"open_clip:small-clip-of-a-test@{cut}", "cpu")
    state = load_file(weights)
    save_file({"text_projection": state["text_projection"]}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"(?s)other.safetensors.*visual\.proj"):
        load_clip(f"open_clip:small-clip-of-a-test@{tmp_path / 'other.safetensors'}", "cpu")
    torch.save({"model": Path("x")}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="pickled.pt") as error:
        load_clip(f"open_clip:small-clip-of-a-test@{tmp_path / 'pickled.pt'}", "cpu")
    assert "weights_only" not in str(error.value)


def test_a_folder_without_weights_is_refused(open_clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((open_clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="could not be loaded"):  # open_clip alone would go on with random weights
        load_clip(f"open_clip:local-dir:{tmp_path}", "cpu")


def test_missing_open_clip_weights_say_what_to_download() -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_clip("open_clip:ViT-B-32/openai", "cpu")
    message = str(error.value)
    assert "timm/vit_base_patch32_clip_224.openai" in message and "open_clip_model.safetensors" in message
    assert "open_clip:ViT-B-32-quickgelu@<file>" in message  # OpenAI's activation, which a file cannot say


@pytest.mark.parametrize(
    ("setting", "kind", "words"),
    [
        ("open_clip:ViT-L14/openai", ValueError, "ViT-L-14"),
        ("open_clip:ViT-L-14/opnai", ValueError, "openai"),
        ("open_clip:ViT-L-14", ValueError, "open_clip:<architecture>@<file>"),
        ("open_clip:", ValueError, "open_clip:<architecture>/<tag>"),
        ("open_clip:ViT-L-14@/nowhere/clip.pt", FileNotFoundError, "/nowhere/clip.pt"),
        ("open_clip:local-dir:/nowhere", FileNotFoundError, "/nowhere"),
    ],
)
def test_bad_settings_are_explained(setting: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        load_clip(setting, "cpu")
    assert words in str(error.value)


def test_openais_activation_is_the_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def create(architecture: str, **options: Any) -> Any:
        asked.update(options, architecture=architecture)
        raise RuntimeError("enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    for setting, quick in (("ViT-L-14/openai", True), ("ViT-L-14/laion2b_s32b_b82k", False)):
        with pytest.raises(FileNotFoundError, match="enough"):
            load_clip(f"open_clip:{setting}", "cpu")
        assert asked["force_quick_gelu"] is quick and asked["require_pretrained"] is True


@pytest.mark.parametrize(("name", "key"), [("clip", "visual_projection.weight"), ("dino", "layernorm.weight")])
def test_weights_that_lack_keys_are_refused(name: str, key: str, tmp_path: Path) -> None:
    source = Path(resolve_model(addiff_env.TINY[name]))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(source / "model.safetensors")
    del state[key]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=key):  # transformers alone would fill it with random numbers
        CLIPEncoder(str(tmp_path)) if name == "clip" else DINOEncoder(str(tmp_path))


# ------------------------------------------------------------------ bad input

BAD_PICTURES = [
    (torch.full((1, 3, 8, 8), float("nan")), "nan"),
    (torch.full((1, 3, 8, 8), float("inf")), "inf"),
    (torch.rand(1, 3, 8, 8) * 255, r"\[0, 1\]"),
    (torch.rand(1, 3, 8, 8) * 2 - 1, "-"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
    (torch.rand(0, 3, 8, 8), "empty"),
    (torch.rand(1, 3, 0, 8), "empty"),
    (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
    (torch.rand(1, 4, 8, 8), r"\(1, 4, 8, 8\)"),
    (torch.rand(1, 8, 8, 3), r"\(1, 8, 8, 3\)"),
]


@pytest.mark.parametrize(("pictures", "words"), BAD_PICTURES)
def test_bad_pictures_are_shown(
    pictures: torch.Tensor, words: str, small_clip: OpenCLIPEncoder, packaged_clip: ContrastiveEncoder
) -> None:
    dino = DINOEncoder(resolve_model(addiff_env.TINY["dino"]))
    for look in (small_clip.image_features, packaged_clip.image_features, dino.image_features):
        with pytest.raises(ValueError, match=words):
            look(pictures)


def test_bad_texts_are_shown(small_clip: OpenCLIPEncoder) -> None:
    with pytest.raises(TypeError, match="'abc'"):
        small_clip.text_features("abc")
    with pytest.raises(TypeError, match="int: 7"):
        small_clip.text_features(["a", 7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="empty list"):
        small_clip.text_features([])
    with pytest.raises(ValueError, match="2 pictures but 3 prompts"):
        check_pairs(torch.rand(2, 3, 8, 8), ["a", "b", "c"])
    with pytest.raises(TypeError, match="ndarray"):
        check_pictures(np.zeros((1, 3, 8, 8)))  # type: ignore[arg-type]


def test_unvalidated_pictures_are_not_asked_for_their_values(packaged_clip: ContrastiveEncoder) -> None:
    pictures = torch.rand(1, 3, 64, 64)
    with unvalidated_pictures():
        check_pictures(pictures * math.nan)
        assert torch.equal(packaged_clip.image_features(pictures), packaged_clip.image_features(pictures))
        with pytest.raises(ValueError, match=r"\(3, 64, 64\)"):
            check_pictures(pictures[0])
    with pytest.raises(ValueError, match="nan"):
        check_pictures(pictures * math.nan)
    with pytest.raises(KeyError), unvalidated_pictures():
        raise KeyError("on the way")
    with pytest.raises(ValueError, match="nan"):
        check_pictures(pictures * math.nan)


def test_a_little_overshoot_is_allowed(packaged_clip: ContrastiveEncoder) -> None:
    pictures = torch.rand(1, 3, 64, 64)
    pictures[0, 0, 0, 0], pictures[0, 0, 0, 1] = -0.005, 1.005
    assert torch.equal(packaged_clip.image_features(pictures), packaged_clip.image_features(pictures.clamp(0, 1)))
