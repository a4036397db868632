"""Scorers: official state dicts and formulas, settings, damaged checkpoints, bad input."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import addiff_env
from addiff_env import cli
from addiff_env.env.reward import RewardConfig, quality
from addiff_env.loading.paths import resolve_model
from addiff_env.perception.encoders import CLIPEncoder, DINOEncoder, OpenCLIPEncoder, load_clip
from addiff_env.perception.features import Perception
from addiff_env.perception.preprocessing import OPENAI_CLIP
from addiff_env.perception.scorers import (
    Aesthetic,
    CLIPScore,
    HPSv2,
    ImageReward,
    PickScore,
    PixelTextReward,
    Scorer,
    load_scorer,
)
from addiff_env.perception.scorers.base import Source, find_checkpoint, load_exactly, read_checkpoint
from addiff_env.perception.scorers.image_reward import MEAN, STD, UNUSED, bert_tokenizer, rename_official
from addiff_env.tiny.tokenizer import build_tokenizer

TINY_CLIP = addiff_env.TINY["clip"]
DINO = resolve_model(addiff_env.TINY["dino"])
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
}
TEXT = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def pictures(number: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def normalised(batch: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in OPENAI_CLIP)
    return (batch - mean) / std


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of BERT's size, with a few of its words at their places."""
    words = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1037: "a", 2417: "red", 4937: "cat"}
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(words.get(i, f"[unused{i}]") for i in range(30522)) + "\n")
    return folder


def small_image_reward(bert: Path) -> ImageReward:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer = ImageReward(bert_tokenizer(str(bert)), VISION, TEXT)
        for value in scorer.parameters():
            value.normal_(std=0.15)
    return scorer


@pytest.fixture(scope="module")
def image_reward(bert: Path) -> ImageReward:
    return small_image_reward(bert)


def small_open_clip(preprocess: Any = None, seed: int = 0) -> OpenCLIPEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OpenCLIPEncoder(open_clip.CLIP(**SMALL_CLIP), open_clip.tokenize, "cpu", preprocess)


@pytest.fixture(scope="module")
def scorers(image_reward: ImageReward) -> dict[str, Scorer]:
    """One of each kind, small."""
    clip = load_clip(resolve_model(TINY_CLIP), "cpu")
    assert isinstance(clip, CLIPEncoder)
    return {
        "pixel_text": load_scorer(addiff_env.TINY["scorer"]),
        "clipscore": CLIPScore(clip),
        "hps": HPSv2(small_open_clip(HPSv2.preprocess(64))),
        "pickscore": PickScore(clip),
        "aesthetic": Aesthetic(clip).eval(),
        "imagereward": image_reward,
    }


# ------------------------------------------------------------------ ImageReward


def official_keys(blocks: int, layers: int) -> list[str]:
    """The names in the official ``ImageReward.pt``, written down from the package's modules."""
    pair = ("weight", "bias")
    seen = ["cls_token", "pos_embed", *(f"patch_embed.proj.{p}" for p in pair), *(f"norm.{p}" for p in pair)]
    inner = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    seen += [f"blocks.{i}.{part}.{p}" for i in range(blocks) for part in inner for p in pair]
    embeddings = ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    read = ["embeddings.position_ids", *(f"embeddings.{name}" for name in embeddings)]
    attends = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    inner = (
        *(f"{kind}.{part}" for kind in ("attention", "crossattention") for part in attends),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    )
    read += [f"encoder.layer.{i}.{part}.{p}" for i in range(layers) for part in inner for p in pair]
    projections = [f"blip.{name}.{p}" for name in ("vision_proj", "text_proj") for p in pair]
    head = [f"mlp.layers.{i}.{p}" for i in (0, 2, 4, 6, 7) for p in pair]
    return [f"blip.visual_encoder.{n}" for n in seen] + [f"blip.text_encoder.{n}" for n in read] + projections + head


def official_state(scorer: ImageReward) -> dict[str, torch.Tensor]:
    """A state dict in the official naming with the weights of ``scorer``."""
    ours = scorer.state_dict()
    names = official_keys(scorer.vision.config.num_hidden_layers, scorer.text.config.num_hidden_layers)
    renamed = rename_official({name: torch.zeros(1) for name in names})
    assert len(renamed) == len(names)
    pairs = zip(names, renamed, strict=True)
    return {official: ours.get(name, torch.zeros(1)) for official, name in pairs}


def test_every_official_key_is_accounted_for_at_full_size(bert: Path) -> None:
    with torch.device("meta"):
        full = ImageReward(bert_tokenizer(str(bert)))
    expected = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    state = rename_official(dict.fromkeys(official_keys(24, 12)))  # type: ignore[arg-type]
    assert state.keys() - expected.keys() == set(UNUSED) and expected.keys() <= state.keys()
    assert expected["vision.embeddings.position_embedding"] == (1, 197, 1024)
    assert expected["text.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert expected["text.embeddings.word_embeddings.weight"] == (30524, 768)
    assert expected["head.0.weight"] == (1024, 768)
    unused = 256 * (1024 + 1) + 256 * (768 + 1)
    stored = 4 * (sum(math.prod(shape) for shape in expected.values()) + unused)
    assert abs(stored / 1.79e9 - 1) < 0.01  # bytes of the published file


def test_an_official_state_dict_gives_the_same_scores(image_reward: ImageReward, bert: Path, tmp_path: Path) -> None:
    torch.save(official_state(image_reward), tmp_path / "ImageReward.pt")
    state = rename_official(read_checkpoint(tmp_path / "ImageReward.pt"))
    words = image_reward.tokenizer
    loaded = load_exactly(lambda: ImageReward(words, VISION, TEXT), state, tmp_path / "ImageReward.pt", UNUSED)
    prompts = ["a red cat", "a cat"]
    assert torch.equal(loaded.score(pictures(), prompts), image_reward.score(pictures(), prompts))
    assert not any(value.requires_grad for value in loaded.parameters()) and not loaded.training


def test_image_reward_by_hand(image_reward: ImageReward) -> None:
    """The score from the parts' own outputs, one pair at a time, with unpadded tokens."""
    batch, prompts = pictures(), ["a red cat", "a cat a red cat"]
    ids = {"a": 1037, "red": 2417, "cat": 4937}
    expected = []
    for picture, prompt in zip(batch, prompts, strict=True):
        tokens = torch.tensor([[101, *(ids[word] for word in prompt.split()), 102]])
        seen = image_reward.vision(normalised(picture[None])).last_hidden_state
        hidden = image_reward.text(input_ids=tokens, encoder_hidden_states=seen).last_hidden_state[0, 0]
        for layer in (0, 2, 4, 6, 7):
            hidden = image_reward.head[layer].weight @ hidden + image_reward.head[layer].bias
        expected.append((float(hidden) - 0.16717362830052426) / 1.0333394966054072)
    assert image_reward.score(batch, prompts).tolist() == pytest.approx(expected, rel=1e-4)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_overlong_prompts_are_cut_at_35_tokens(image_reward: ImageReward) -> None:
    long, cut, other = "a red " * 40, " ".join(["a red"] * 16 + ["a"]), " ".join(["a red"] * 16)
    batch = pictures(1).expand(3, -1, -1, -1)
    scores = image_reward.score(batch, [long, cut, other])  # 33 words, [CLS] and [SEP]
    assert scores[0] == scores[1] and scores[0] != scores[2]


def test_image_reward_scores_do_not_depend_on_the_batch(image_reward: ImageReward) -> None:
    batch, prompts = pictures(3), ["a red cat", "", "a cat " * 30]
    together = image_reward.score(batch, prompts)
    alone = [float(image_reward.score(batch[i : i + 1], [prompts[i]])) for i in range(3)]
    assert together.shape == (3,) and together.dtype == torch.float32
    assert together.tolist() == pytest.approx(alone, rel=1e-4)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(ValueError, match="30522"):
        bert_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="(?s)nowhere.*bert-base-uncased.*tokenizer=<their folder>"):
        bert_tokenizer(str(tmp_path / "nowhere"))


# ------------------------------------------------------------------ scorers made of CLIP


def test_clip_score_is_the_cosine() -> None:
    encoder = small_open_clip()
    prompts = ["a red circle", "two birds"]
    with torch.no_grad():
        image, text, scale = encoder.model(normalised(pictures()), open_clip.tokenize(prompts))
    expected = F.cosine_similarity(image, text)
    assert torch.allclose(CLIPScore(encoder).score(pictures(), prompts), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(96, 160), (160, 96), (128, 128), (64, 40)])
def test_hps_shows_the_whole_picture(height: int, width: int) -> None:
    """The official score: longest side resized as a tensor, black bars, cosine of normalised features."""
    scorer = HPSv2(small_open_clip(HPSv2.preprocess(64)))
    picture = pictures(1, height, width)
    scale = 64 / max(height, width)
    size = round(height * scale), round(width * scale)
    small = F.interpolate(picture, size, mode="bicubic", antialias=True, align_corners=False)
    canvas = torch.zeros(1, 3, 64, 64)
    top, left = (64 - size[0]) // 2, (64 - size[1]) // 2
    canvas[:, :, top : top + size[0], left : left + size[1]] = small
    with torch.no_grad():
        image, text, _ = scorer.text_encoder.model(normalised(canvas), open_clip.tokenize(["a bird"]))  # type: ignore[attr-defined]
    assert scorer.score(picture, ["a bird"]).item() == pytest.approx(float((image * text).sum()), abs=1e-6)


def test_pick_score_is_transformers_logit() -> None:
    encoder = load_clip(resolve_model(TINY_CLIP), "cpu")
    assert isinstance(encoder, CLIPEncoder)
    prompts = ["a red circle", "a star"]
    tokens = encoder.tokenizer(prompts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        logits = encoder.model(
            pixel_values=(pictures() - 0.5) / 0.5, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).logits_per_image
    scorer = PickScore(encoder)
    assert torch.allclose(scorer.score(pictures(), prompts), logits.diagonal(), rtol=1e-4)
    assert scorer.limit == pytest.approx(float(encoder.model.logit_scale.exp()))


def test_a_pickscore_folder_by_the_official_formula(tmp_path: Path) -> None:
    """Random weights as transformers saves them; its model, processor and tokenizer, and the model card's formula."""
    tokenizer = build_tokenizer()
    text = {**TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    vision = {**VISION, "image_size": 224, "patch_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
        ).eval()
    processor = transformers.CLIPImageProcessor()
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    batch, prompts = pictures(2, 300, 260), ["a red circle", "two blue squares and a star"]
    batch = (batch * torch.tensor([0.2, 1.0]).view(2, 1, 1, 1) * 255).round() / 255
    as_pil = [Image.fromarray((p.permute(1, 2, 0) * 255).round().byte().numpy()) for p in batch]
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(**processor(as_pil, return_tensors="pt")).pooler_output)
        words = model.text_projection(
            model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        )
        image, words = (x / x.norm(dim=-1, keepdim=True) for x in (image, words))
        expected = model.logit_scale.exp() * (words @ image.T).diagonal()
    torch.testing.assert_close(load_scorer(f"pickscore:{tmp_path}").score(batch, prompts), expected, rtol=0, atol=5e-3)
    assert abs(float(expected[0] - expected[1])) > 0.05  # the pairs do score differently


def test_aesthetic_is_a_linear_map_of_unit_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {0: (1024, 128), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    state = {f"layers.{i}.weight": rng.normal(0, 1 / shape[1] ** 0.5, shape) for i, shape in sizes.items()}
    state |= {f"layers.{i}.bias": rng.normal(0, 0.1, shape[0]) for i, shape in sizes.items()}
    file = tmp_path / "aesthetic-model.pth"
    torch.save({name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}, file)
    scorer = load_scorer(f"aesthetic:{file},clip={TINY_CLIP}")
    encoder = load_clip(resolve_model(TINY_CLIP), "cpu")
    hidden = encoder.image_features(pictures()).double().numpy()
    assert np.linalg.norm(hidden, axis=1) == pytest.approx(1.0)
    for i in sizes:
        hidden = hidden @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    assert scorer.score(pictures(), ["a", "b"]).tolist() == pytest.approx(hidden[:, 0].tolist(), rel=1e-4)
    published = torch.nn.Sequential(  # LAION's own module: dropouts hold the odd places, and do nothing here
        *(torch.nn.Linear(encoder.width, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128)),
        *(torch.nn.Dropout(0.2), torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16)),
        torch.nn.Linear(16, 1),
    ).eval()
    names = {name.removeprefix("layers."): value for name, value in torch.load(file, weights_only=True).items()}
    published.load_state_dict(names)
    with torch.no_grad():
        rated = published(encoder.image_features(pictures()))[:, 0]
    torch.testing.assert_close(scorer.score(pictures(), ["a", "b"]), rated)
    assert load_scorer(f"aesthetic:{tmp_path},clip={TINY_CLIP}").score(pictures(), ["a", "b"]).shape == (2,)


def test_a_hps_checkpoint_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that open_clip made and saved, its own forward, and the published score: a product of unit features."""
    config = SMALL_CLIP | {"vision_cfg": SMALL_CLIP["vision_cfg"] | {"image_size": 224, "patch_size": 32}}
    (tmp_path / "small-hps-of-a-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.create_model("small-hps-of-a-test").eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "HPS_v2.1_compressed.pt")
    monkeypatch.setattr("addiff_env.perception.scorers.clip_based.HPS_ARCHITECTURE", "small-hps-of-a-test")
    scorer = load_scorer(f"hps:{tmp_path}")
    batch, prompts = pictures(2, 120, 300), ["a bird", "a castle by the sea " * 30]
    canvas = torch.zeros(2, 3, 224, 224)
    canvas[:, :, 67:157] = F.interpolate(batch, (90, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        image, text = model.encode_image(normalised(canvas)), model.encode_text(open_clip.tokenize(prompts))
    expected = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).diagonal()
    scores = scorer.score(batch, prompts)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert abs(float(scores[0] - scores[1])) > 1e-3


def test_hps_checkpoints_carry_open_clips_vit_h() -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert sum(value.numel() for value in model.parameters()) == 986_109_441  # as published for ViT-H-14
    assert not open_clip.get_model_config("ViT-H-14").get("quick_gelu", False)


# ------------------------------------------------------------------ settings


def test_a_folder_is_a_pixel_text_reward() -> None:
    scorer = load_scorer(addiff_env.TINY["scorer"])
    assert isinstance(scorer, PixelTextReward) and scorer.limit == 30
    assert load_scorer(addiff_env.TINY["scorer"]) is scorer
    assert load_scorer(resolve_model(addiff_env.TINY["scorer"])).score(pictures(), ["a", "b"]).shape == (2,)


def test_settings_with_a_path_and_options() -> None:
    scorer = load_scorer(f"clipscore:{TINY_CLIP}")
    assert isinstance(scorer, CLIPScore)
    assert scorer.text_encoder is load_clip(resolve_model(TINY_CLIP), "cpu")
    picked = load_scorer(f"pickscore:{TINY_CLIP},processor={TINY_CLIP}")
    plain = load_scorer(f"pickscore:{TINY_CLIP}")
    assert torch.equal(picked.score(pictures(), ["a", "b"]), plain.score(pictures(), ["a", "b"]))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("imagereward", ["THUDM/ImageReward", "ImageReward.pt", "imagereward:<path"]),
        ("hps", ["xswu/HPSv2", "HPS_v2.1_compressed.pt", "hps:<path"]),
        ("aesthetic", ["trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"]),
        ("pickscore", ["yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]),
        ("imagereward:/nowhere/ImageReward.pt", ["/nowhere/ImageReward.pt", "THUDM/ImageReward"]),
        ("hps:/nowhere", ["/nowhere", "xswu/HPSv2"]),
        ("pickscore:/nowhere", ["/nowhere", "yuvalkirstain/PickScore_v1"]),
        ("clipscore:/nowhere", ["/nowhere"]),
        ("clipscore:open_clip:ViT-L-14/openai", ["timm/vit_large_patch14_clip_224.openai"]),
        ("/nowhere/reward", ["/nowhere/reward", "imagereward"]),
        ("image_reward", ["'image_reward'", "imagereward, hps, pickscore, aesthetic, clipscore:"]),
    ],
)
def test_missing_weights_say_what_to_download(setting: str, words: list[str]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load_scorer(setting)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("clipscore", "clipscore:open_clip:ViT-L-14/openai"),
        ("imagereward:a.pt,tokeniser=b", "'tokeniser=b'.*tokenizer"),
        ("hps:a.pt,clip=b", "none"),
        ("aesthetic:a.pth,b.pth", "'b.pth'"),
    ],
)
def test_bad_settings_are_shown(setting: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_scorer(setting)


# ------------------------------------------------------------------ damaged and foreign checkpoints


def save(state: dict[str, Any], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(state, file, {"format": "pt"})
    else:
        torch.save(state, file)


def spoil(kind: str, state: dict[str, torch.Tensor], file: Path) -> None:
    first = next(name for name, value in state.items() if value.is_floating_point() and value.ndim > 1)
    if kind == "truncated":
        save(state, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "garbage":
        file.write_bytes(b"not a checkpoint" * 100)
    elif kind == "pickled":
        torch.save({"state_dict": Path("/")}, file)
    elif kind == "number":
        torch.save({"epoch": 3}, file)
    elif kind == "numbered":
        torch.save({3: torch.zeros(2)}, file)
    elif kind == "missing":
        save({name: value for name, value in state.items() if name != first}, file)
    elif kind == "foreign":
        save(state | {"decoder.weight": torch.zeros(2)}, file)
    elif kind == "shape":
        save(state | {first: state[first][..., :1].contiguous()}, file)
    else:
        broken = state[first].clone()
        broken.view(-1)[-1] = float(kind)
        save(state | {first: broken}, file)


SPOILT = {
    "truncated": "truncated, corrupted",
    "empty": "truncated, corrupted",
    "garbage": "truncated, corrupted",
    "pickled": "truncated, corrupted",
    "number": "no state dict",
    "numbered": "no state dict",
    "missing": "1 keys missing: ",
    "foreign": "1 keys not known: decoder.weight",
    "shape": "of another shape: .* instead of",
    "nan": "not finite",
    "inf": "not finite",
}


@pytest.mark.parametrize(("kind", "words"), SPOILT.items())
def test_a_spoilt_aesthetic_head_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    state = Aesthetic(load_clip(resolve_model(TINY_CLIP), "cpu")).state_dict()
    spoil(kind, state, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=words) as error:
        load_scorer(f"aesthetic:{tmp_path / 'head.pth'},clip={TINY_CLIP}")
    assert "head.pth" in str(error.value) and "weights_only" not in str(error.value)


def test_a_bit_out_of_place_is_never_a_puzzle(tmp_path: Path) -> None:
    """Whatever a damaged file makes torch raise, a ValueError with the file's name comes out of it."""
    torch.save({"weight": torch.ones(4, 4), "bias": torch.zeros(4)}, tmp_path / "head.pth")
    data, rng = (tmp_path / "head.pth").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        spoilt = bytearray(data)
        for place in rng.integers(len(data), size=4):
            spoilt[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "head.pth").write_bytes(spoilt)
        try:
            read_checkpoint(tmp_path / "head.pth")
        except ValueError as error:
            assert "head.pth" in str(error)
            refused += 1
    assert refused > 30


class SmallImageReward(ImageReward):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, VISION, TEXT)


def copied(source: str, folder: Path) -> Path:
    folder.mkdir()
    for file in Path(resolve_model(source)).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def loaders(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Of every kind of model with weights: the file that holds them, sound as it is, and what loads it."""
    (tmp_path / "small-clip-to-damage.json").write_text(json.dumps(SMALL_CLIP))
    open_clip.add_model_config(tmp_path / "small-clip-to-damage.json")
    monkeypatch.setattr("addiff_env.perception.scorers.clip_based.HPS_ARCHITECTURE", "small-clip-to-damage")
    clip, dino, reward = (copied(addiff_env.TINY[name], tmp_path / name) for name in ("clip", "dino", "scorer"))
    hub, hps, head, official = tmp_path / "hub", tmp_path / "hps.pt", tmp_path / "head.pth", tmp_path / "official.pt"
    hub.mkdir()
    (hub / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}))
    state = small_open_clip().model.state_dict()
    for file in (hub / "open_clip_model.safetensors", hps):
        save(state, file)
    save(Aesthetic(load_clip(resolve_model(TINY_CLIP), "cpu")).state_dict(), head)
    save(official_state(small_image_reward(bert)), official)
    return {
        "CLIP": (clip / "model.safetensors", lambda: CLIPEncoder(str(clip))),
        "DINO": (dino / "model.safetensors", lambda: DINOEncoder(str(dino))),
        "open_clip folder": (
            hub / "open_clip_model.safetensors",
            lambda: load_clip(f"open_clip:local-dir:{hub}", "cpu"),
        ),
        "open_clip file": (hps, lambda: load_clip(f"open_clip:small-clip-to-damage@{hps}", "cpu")),
        "PixelTextReward": (reward / "model.safetensors", lambda: load_scorer(str(reward))),
        "PickScore": (clip / "model.safetensors", lambda: load_scorer(f"pickscore:{clip}")),
        "HPS": (hps, lambda: load_scorer(f"hps:{hps}")),
        "Aesthetic": (head, lambda: load_scorer(f"aesthetic:{head},clip={TINY_CLIP}")),
        "ImageReward": (official, lambda: SmallImageReward.from_checkpoint(str(official), tokenizer=str(bert))),
    }


KINDS = (
    *("CLIP", "DINO", "open_clip folder", "open_clip file", "PixelTextReward", "PickScore", "HPS", "Aesthetic"),
    "ImageReward",
)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_checkpoint_is_named(kind: str, loaders: dict[str, tuple[Path, Callable[[], Any]]]) -> None:
    file, load = loaders[kind]
    load()  # sound as it is
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    for damage in ("truncated", "empty", "garbage", "missing", "shape", "nan", "inf"):
        spoil(damage, state, file)
        with pytest.raises(ValueError) as error:
            load()
        message = str(error.value)
        assert str(file) in message or str(file.parent) in message, (damage, message)
        assert ("not finite" in message) == (damage in ("nan", "inf")), (damage, message)


@pytest.mark.parametrize(
    ("kind", "file", "text"),
    [
        *(("CLIP", file, text) for file in ("config.json", "tokenizer.json", "processor_config.json") for text in "{x"),
        ("DINO", "config.json", "{"),
        *(("PixelTextReward", "config.json", text) for text in ("", "{", "[]", "{}", '{"model_type": "clip"}')),
        ("PixelTextReward", "config.json", '{"model_type": "pixel_text_reward", "vocab_size": 631, "hight": 3}'),
        ("PixelTextReward", "config.json", '{"model_type": "pixel_text_reward", "vocab_size": "many"}'),
        *(("PixelTextReward", "tokenizer.json", text) for text in ("", "{", "[]", "{}")),
        ("open_clip folder", "open_clip_config.json", "{"),
    ],
)
def test_a_damaged_description_is_named(
    kind: str, file: str, text: str, loaders: dict[str, tuple[Path, Callable[[], Any]]]
) -> None:
    weights, load = loaders[kind]
    (weights.parent / file).write_text(text)
    with pytest.raises(ValueError) as error:
        load()
    assert str(weights.parent) in str(error.value)


@pytest.mark.parametrize("source", ["clip", "scorer", "model"])
def test_another_models_folder_is_no_dino(source: str) -> None:
    folder = resolve_model(addiff_env.TINY[source])
    with pytest.raises(ValueError, match="DINO") as error:
        DINOEncoder(folder)
    assert folder in str(error.value)


@pytest.mark.parametrize("source", ["dino", "scorer", "model"])
def test_another_models_folder_is_no_clip(source: str) -> None:
    folder = resolve_model(addiff_env.TINY[source])
    for load in (load_clip, lambda path, device: load_scorer(f"pickscore:{path}", device)):
        with pytest.raises(ValueError, match="CLIP") as error:
            load(folder, "cpu")
        assert folder in str(error.value)


@pytest.mark.parametrize("setting", ["imagereward", "hps"])
def test_foreign_checkpoints_are_refused_before_anything_large_is_built(
    setting: str, bert: Path, tmp_path: Path
) -> None:
    torch.save({"state_dict": {"module.visual.proj": torch.zeros(2, 2)}}, tmp_path / "other.pt")
    option = f",tokenizer={bert}" if setting == "imagereward" else ""
    with pytest.raises(ValueError, match="other.pt does not fit .* keys missing: .*, \\.\\.\\.") as error:
        load_scorer(f"{setting}:{tmp_path / 'other.pt'}{option}")
    assert "visual.proj" in str(error.value)


def test_a_foreign_pickscore_is_refused(tmp_path: Path) -> None:
    source = Path(resolve_model(TINY_CLIP))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(
        {"text_model.final_layer_norm.weight": torch.zeros(128)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match="lack .* keys"):
        load_scorer(f"pickscore:{tmp_path}")


def test_checkpoints_may_be_safetensors_half_precision_or_data_parallel(tmp_path: Path) -> None:
    clip = load_clip(resolve_model(TINY_CLIP), "cpu")
    state = Aesthetic(clip).state_dict()
    save_file(state, tmp_path / "head.safetensors")
    torch.save({"state_dict": {f"module.{n}": v.half() for n, v in state.items()}, "epoch": 1}, tmp_path / "head.pth")
    exact = load_scorer(f"aesthetic:{tmp_path / 'head.safetensors'},clip={TINY_CLIP}").score(pictures(), ["a", "b"])
    half = load_scorer(f"aesthetic:{tmp_path / 'head.pth'},clip={TINY_CLIP}").score(pictures(), ["a", "b"])
    assert half.dtype == torch.float32 and torch.allclose(exact, half, atol=1e-2)


def test_a_folder_may_hold_the_checkpoint(tmp_path: Path) -> None:
    source = Source("someone/model", "weights.pt")
    with pytest.raises(FileNotFoundError, match="someone/model"):
        find_checkpoint(str(tmp_path), source, "scorer")
    (tmp_path / "weights.pt").touch()
    assert find_checkpoint(str(tmp_path), source, "scorer") == tmp_path / "weights.pt"


# ------------------------------------------------------------------ bad input, every scorer

NAMES = ("pixel_text", "clipscore", "hps", "pickscore", "aesthetic", "imagereward")


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_shown(name: str, scorers: dict[str, Scorer]) -> None:
    score: Callable[..., torch.Tensor] = scorers[name].score
    cases = [
        (pictures() * math.nan, ["a", "b"], r"\[0, 1\] without NaN, got \[nan, nan\]"),
        (pictures() * 255, ["a", "b"], r"\[0, 1\]"),
        ((pictures() * 255).to(torch.uint8), ["a", "b"], "uint8"),
        (pictures(0), [], "empty batch"),
        (pictures(2), ["a"], "2 pictures but 1 prompts"),
        (pictures(1), ["a", "b"], "1 pictures but 2 prompts"),
        (pictures(1)[0], ["a"], r"\(3, 64, 64\)"),
    ]
    for batch, prompts, words in cases:
        with pytest.raises(ValueError, match=words):
            score(batch, prompts)
    with pytest.raises(TypeError, match="'ab'"):
        score(pictures(), "ab")
    with pytest.raises(TypeError, match="NoneType"):
        score(pictures(), ["a", None])


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_one_float_per_picture(name: str, scorers: dict[str, Scorer]) -> None:
    batch, prompts = pictures(3, 48, 80), ["a red circle", "", "a star"]
    scores = scorers[name].score(batch, prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert scores.abs().max() <= scorers[name].limit
    alone = [float(scorers[name].score(batch[i : i + 1], prompts[i : i + 1])) for i in range(3)]
    assert scores.tolist() == pytest.approx(alone, rel=1e-3, abs=1e-5)


# Scores that published models' pictures usually get; a step within them has to be felt.
USUAL = {
    "pixel_text": (-3.0, 3.0),
    "clipscore": (0.2, 0.33),
    "hps": (0.22, 0.32),
    "pickscore": (18.0, 23.0),
    "aesthetic": (4.0, 7.0),
    "imagereward": (-2.0, 2.0),
}


@pytest.mark.parametrize("name", NAMES)
def test_usual_scores_of_any_scorer_make_a_live_reward(name: str, scorers: dict[str, Scorer]) -> None:
    """With one scale for all, PickScore's 18 and 23 are the same quality: 1."""
    config = RewardConfig(clip_weight=0, reward_weight=1).for_scorer(scorers[name].mean, scorers[name].std)
    low, high = quality(np.zeros(2), np.array(USUAL[name]), config)
    assert 0.02 < low < 0.35 and 0.65 < high < 0.98


def test_an_environments_reward_has_its_scorers_scale(small_kwargs: dict[str, Any]) -> None:
    scorer = f"pickscore:{resolve_model(TINY_CLIP)}"
    env: Any = gym.make("AdDiffusion-Tiny-v0", **{**small_kwargs, "scorer": scorer}).unwrapped
    config = env.vector.reward_config
    assert (config.reward_mean, config.reward_std) == (PickScore.mean, PickScore.std) and config.clip_mean == 0.64
    settings = {**small_kwargs, "scorer": scorer, "reward": {"reward_mean": 3.0}}
    own = gym.make("AdDiffusion-Tiny-v0", **settings).unwrapped
    assert own.vector.reward_config.reward_scale == (3.0, PickScore.std)  # type: ignore[attr-defined]


# ------------------------------------------------------------------ what looking costs


def test_perception_counts_whatever_looks(tmp_path: Path) -> None:
    clip = resolve_model(TINY_CLIP)
    head = tmp_path / "head.pth"
    torch.save(Aesthetic(load_clip(clip, "cpu")).state_dict(), head)
    plain = Perception(clip, DINO, f"clipscore:{clip}", torch.device("cpu"))
    rated = Perception(clip, DINO, f"aesthetic:{head},clip={clip}", torch.device("cpu"))
    linear = 2 * (128 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16)
    assert rated.flops(64, 64) - plain.flops(64, 64) == linear  # both look with CLIP once more
    assert plain.text_flops() == rated.text_flops() > 0  # the same encoder reads the prompt once
    (tmp_path / "clip").symlink_to(clip)
    apart = Perception(clip, DINO, f"clipscore:{tmp_path / 'clip'}", torch.device("cpu"))
    assert apart.text_flops() == 2 * plain.text_flops()


def test_the_observation_is_bounded_by_the_scorer() -> None:
    perception = Perception(TINY_CLIP, addiff_env.TINY["dino"], f"clipscore:{TINY_CLIP}", torch.device("cpu"))
    assert perception.score_limit == 1
    assert (
        Perception(
            **{n: addiff_env.TINY[n] for n in ("clip", "dino", "scorer")}, device=torch.device("cpu")
        ).score_limit
        == 30
    )
    look = perception.look(pictures(), ["a", "b"])
    assert torch.allclose(look.clip_score, look.reward_score)


def test_an_environment_may_be_scored_by_another_model(small_kwargs: dict[str, Any]) -> None:
    env = gym.make("AdDiffusion-Tiny-v0", **{**small_kwargs, "scorer": f"clipscore:{small_kwargs['clip']}"})
    observation, info = env.reset(options={"prompt": "a red circle", "seed": 0})
    assert env.observation_space.contains(observation)
    assert info["reward_score"] == pytest.approx(info["clip_score"], abs=1e-6)
    assert env.observation_space.contains(env.step(1)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_scores_on_the_gpu_are_those_of_the_cpu(name: str, scorers: dict[str, Scorer], bert: Path) -> None:
    clip = load_clip(resolve_model(TINY_CLIP), "cuda")
    assert isinstance(clip, CLIPEncoder)
    hps = OpenCLIPEncoder(small_open_clip().model, open_clip.tokenize, "cuda", HPSv2.preprocess(64))
    head = Aesthetic(clip).eval()
    head.load_state_dict(scorers["aesthetic"].state_dict())  # type: ignore[attr-defined]
    on_gpu: dict[str, Scorer] = {
        "pixel_text": load_scorer(addiff_env.TINY["scorer"], "cuda"),
        "clipscore": CLIPScore(clip),
        "hps": HPSv2(hps),
        "pickscore": PickScore(clip),
        "aesthetic": head.to("cuda"),
        "imagereward": small_image_reward(bert).to("cuda"),
    }
    batch, prompts = pictures(2, 96, 130), ["a red circle", "a cat"]
    expected = scorers[name].score(batch, prompts).tolist()
    assert on_gpu[name].score(batch.cuda(), prompts).tolist() == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert on_gpu[name].score(batch, prompts).device.type == "cuda"  # pictures may come from the host


# ------------------------------------------------------------------ the published weights


@pytest.mark.weights
def test_the_four_pictures_of_imagerewards_readme() -> None:
    """``ADDIFF_IMAGEREWARD_ASSETS`` is ``assets/images`` of the official repository, with 1.webp to 4.webp.

    ``ADDIFF_IMAGEREWARD`` may name the checkpoint (a scorer setting); without it, it comes from the Hub.
    """
    if not os.environ.get("ADDIFF_IMAGEREWARD_ASSETS"):
        pytest.skip("set ADDIFF_IMAGEREWARD_ASSETS to assets/images of the official ImageReward repository")
    assert cli.main(["selftest", "device=cpu", "--checks", "imagereward"]) == 0


@pytest.mark.weights
def test_published_pickscore_prefers_the_right_prompt() -> None:
    """The official formula by transformers' own processor and model, on a picture drawn here."""
    scorer = load_scorer(os.environ.get("ADDIFF_PICKSCORE", "pickscore"))
    assert isinstance(scorer, PickScore)
    picture = Image.new("RGB", (512, 384), (200, 30, 30))
    processor = transformers.AutoProcessor.from_pretrained(
        os.environ.get("ADDIFF_PICKSCORE_PROCESSOR", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    )
    prompts = ["a red wall", "a blue sea"]
    inputs = processor(
        text=prompts, images=[picture] * 2, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        official = scorer.text_encoder.model(**inputs).logits_per_image.diagonal()  # type: ignore[attr-defined]
    ours = scorer.score(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].expand(2, -1, -1, -1) / 255, prompts)
    assert ours.tolist() == pytest.approx(official.tolist(), abs=0.02) and ours[0] > ours[1]


@pytest.mark.weights
@pytest.mark.parametrize("setting", ["hps", "aesthetic"])
def test_published_scorers_load_and_rate_within_their_range(setting: str) -> None:
    scorer = load_scorer(os.environ.get(f"ADDIFF_{setting.upper()}", setting))
    low, high = {"hps": (0.05, 0.45), "aesthetic": (1.0, 10.0)}[setting]
    scores = scorer.score(pictures(2, 256, 256), ["a photograph of noise", "a castle by the sea"])
    assert ((scores > low) & (scores < high)).all(), scores
