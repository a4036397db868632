"""Train CLIP (Radford et al. 2021) on the world's pictures, clean and degraded, with hard negatives.

``addiff world train clip`` needs `generate`'s previews and writes ``<out>/clip``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

WIDTH = 128
NEGATIVES = 2  # wrong captions beside every picture's own


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model: 64x64 pictures in patches of 8, both towers 128 wide."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": WIDTH,
        **special,
    }
    vision = {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """Pictures of any size to 64x64, normalised to [-1, 1]."""
    images = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def embed_text(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Unit vectors (B, 128) of captions."""
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
    pooled = model.text_model(**tokens.to(model.device)).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def embed_pictures(model: CLIPModel, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (B, 128) and patch tokens (B, 64, 128) of uint8 pictures (B, 64, 64, 3)."""
    features = model.vision_model(common.to_input(pictures, model.device) * 2 - 1)
    return F.normalize(model.visual_projection(features.pooler_output).float(), dim=-1), features.last_hidden_state[
        :, 1:
    ]


def contrast(
    pictures: torch.Tensor, texts: torch.Tensor, wrong: torch.Tensor, scale: torch.Tensor, same: torch.Tensor
) -> dict[str, torch.Tensor]:
    """InfoNCE of unit vectors (B, D) with hard negatives ``wrong`` (B, K, D).

    ``same`` (B, B) marks pairs of captions that one picture might satisfy both: they are no negatives.
    """
    with torch.autocast(pictures.device.type, enabled=False):  # logits reach 100, too coarse in bfloat16
        inside = scale * pictures @ texts.T  # (B, B)
        hard = scale * (pictures[:, None] * wrong).sum(-1)  # (B, K)
    inside = inside.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool, device=same.device), -math.inf)
    target = torch.arange(len(inside), device=inside.device)
    by_picture = F.cross_entropy(torch.cat([inside, hard], 1), target)
    by_text = F.cross_entropy(inside.T, target)
    ranked = (inside.diagonal()[:, None] > hard).float().mean()
    return {"contrast": (by_picture + by_text) / 2, "beats_hard_negative": ranked}


def export(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write an ordinary CLIP folder in fp16."""
    model.half().save_pretrained(folder)
    common.edit_json(folder / "config.json", dtype="float32")  # fp16 on disk, float32 once loaded
    build_processor(tokenizer).save_pretrained(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and export; returns the exit status."""
    args = common.arguments("world train clip", __doc__ or "", argv, steps=600, batch=128, lr=1e-3, warm_start=0)
    scenes = pairs.load_scenes(args.work, args.seed)
    previews = pairs.load_previews(args.work, scenes)
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    model, detector = build(tokenizer).to(args.device), pairs.Detector(WIDTH).to(args.device)
    if args.warm_start:
        model.load_state_dict(CLIPModel.from_pretrained(args.out / "clip", dtype=torch.float32).state_dict())
    ema = common.EMA(model, 0.995)
    loop = common.Loop("clip", args, {"model": model, "detector": detector, "ema": ema.model}, args.lr)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        half = args.batch // 2
        batch = scenes.take(common.batch_indices(generator, len(scenes.captions), args.batch - half))
        batch = batch + previews.take(common.batch_indices(generator, len(previews.captions), half))
        batch = pairs.shift_and_mirror(batch, generator)
        wrong = [caption for _ in range(NEGATIVES) for caption in pairs.negatives(batch.captions, generator)]
        features, patches = embed_pictures(model, batch.pictures)
        texts = embed_text(model, tokenizer, batch.captions + wrong)
        own, wrong_texts = texts[: args.batch], texts[args.batch :].unflatten(0, (NEGATIVES, -1)).transpose(0, 1)
        counts = pairs.shape_counts(batch.captions)
        same = (counts[:, None] == counts).all(-1).to(args.device)
        losses = contrast(features, own, wrong_texts, model.logit_scale.exp().clamp(max=100), same)
        losses["detection"] = detector.loss(patches, pairs.grid_targets(batch.objects).to(args.device))
        return {"loss": losses["contrast"] + 0.3 * losses["detection"], **losses}

    loop.run(loss_at, ema.update)
    export(ema.model, tokenizer, args.out / "clip")
    print(f"clip: {loop.step} steps in {loop.seconds:.0f} s -> {args.out / 'clip'}")
    return 0
