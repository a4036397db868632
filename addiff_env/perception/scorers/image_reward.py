"""ImageReward (Xu et al. 2023), on transformers' BLIP parts, with the official ``ImageReward.pt``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from addiff_env.loading.isolation import frozen_call
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import quiet_loading
from addiff_env.perception.preprocessing import OPENAI_CLIP, Preprocess, check_pairs
from addiff_env.perception.scorers.base import (
    LOGIT_LIMIT,
    Source,
    find_checkpoint,
    linear_head,
    load_exactly,
    read_checkpoint,
)

SOURCE = Source("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "bert-base-uncased"
MAX_LENGTH = 35  # tokens, [CLS] and [SEP] included
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score on the official training data
SIZE = 224  # pixels

# The official state dict in transformers' names. The text encoder's are the same: both descend from BLIP's `med.py`.
_RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
)
# What the checkpoint carries and the score does not need: BLIP's contrastive projections, and a range of integers.
UNUSED = (
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "text.embeddings.position_ids",
)


def rename_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official state dict in the names of `ImageReward`; what has no counterpart keeps its name."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


class ImageReward(nn.Module):
    """How well people would like a picture for its prompt; about standard normal over generated pictures.

    A ViT-L/16 looks at the picture, BLIP's text encoder reads the prompt and attends to what the ViT saw, and a head
    without activations turns its [CLS] state into a score, which is standardised.

    Args:
        tokenizer: BERT's, as `bert_tokenizer` makes it.
        vision, text: overrides of BLIP's configurations, for smaller networks.
    """

    limit = LOGIT_LIMIT
    mean, std = 0.0, 1.0  # it standardises its scores itself

    def __init__(
        self, tokenizer: Any, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
    ) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        seen = BlipVisionConfig(
            **large | {"image_size": SIZE, "patch_size": 16, "layer_norm_eps": 1e-6} | (vision or {})
        )
        base = {"num_attention_heads": 12, "encoder_hidden_size": seen.hidden_size}
        read = BlipTextConfig(**base | (text or {}))
        self.vision = BlipVisionModel(seen)
        self.text = BlipTextModel(read, add_pooling_layer=False)
        self.head = linear_head(read.hidden_size)
        self.tokenizer = tokenizer
        self.preprocess = Preprocess(seen.image_size, *OPENAI_CLIP)
        self.eval().requires_grad_(False)

    @frozen_call
    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores (B,) float32 of pictures (B, 3, H, W) in [0, 1]; raises as `Scorer.score`."""
        texts = check_pairs(pictures, prompts)
        device = self.head[0].weight.device
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(device, non_blocking=True)
        seen = self.vision(self.preprocess(pictures.to(device))).last_hidden_state  # (B, 1 + patches, width)
        mixed = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state  # (B, MAX_LENGTH, width)
        return ((self.head(mixed[:, 0]) - MEAN) / STD).squeeze(-1)

    @classmethod
    def from_checkpoint(cls, path: str | None = None, device: str = "cpu", tokenizer: str = TOKENIZER) -> ImageReward:
        """Load the official weights, from a local file or the Hub; ``tokenizer`` is BERT's, likewise.

        Raises:
            FileNotFoundError, ValueError: as `find_checkpoint`, `read_checkpoint`, `load_exactly`, `bert_tokenizer`.
        """
        found = find_checkpoint(path, SOURCE, "imagereward")
        state = rename_official(read_checkpoint(found))
        words = bert_tokenizer(tokenizer)
        return load_exactly(lambda: cls(words), state, found, UNUSED).to(device)


def bert_tokenizer(model: str = TOKENIZER) -> Any:
    """BERT's uncased tokenizer of a folder or Hub id, with the tokens that BLIP adds: [DEC] and [ENC].

    Raises:
        FileNotFoundError: it is not there. ValueError: it is damaged, or has another vocabulary.
    """
    from transformers import BertTokenizer

    folder = resolve_model(model)
    try:
        with quiet_loading():
            tokenizer = BertTokenizer.from_pretrained(folder)
    except Exception as error:
        kind = ValueError if Path(folder).is_dir() else FileNotFoundError
        raise kind(
            f"cannot load BERT's tokenizer from {looked_at(model)}: {error}; download vocab.txt and tokenizer.json "
            f"from the Hub repository {TOKENIZER} and pass imagereward:<path to {SOURCE.file}>,tokenizer=<their folder>"
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    ids = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    if ids != [30522, 30523]:
        raise ValueError(f"{model!r} is not BERT's uncased vocabulary: [DEC] and [ENC] became {ids}, not 30522, 30523")
    return tokenizer
