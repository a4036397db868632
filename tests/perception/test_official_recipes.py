"""PickScore and LAION's aesthetic predictor against their published recipes, in plain code, on random weights.

Neither has a package to install: PickScore's model card and LAION's repository publish a few lines each, which are
written out here with the libraries they use: transformers' Auto classes, PIL and torchvision for CLIP's pixels.
"""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from official import PROMPTS, as_tensor, textured
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from addiff_env.perception.scorers import load_scorer

PICTURES = [textured(seed, *size) for seed, size in enumerate([(640, 480), (301, 517), (224, 224), (97, 64)])]


def spread_out(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough for scores to differ between pictures and prompts."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=value[0].numel() ** -0.5)
    return model.eval()


def save_pickscore(folder: Path) -> None:
    """A small CLIP with CLIP's own vocabulary, as its authors save it."""
    words = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(word, word): number for word, number in words.encoder.items()}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(words.bpe_ranks))
    assert len(tokenizer) == 49408
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text, vision = sizes | ids | {"vocab_size": 49408}, sizes | {"patch_size": 14, "image_size": 224}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spread_out(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)))
    for part in (model, CLIPProcessor(CLIPImageProcessor(), tokenizer)):
        part.save_pretrained(folder)


@pytest.mark.slow
def test_pickscore_is_its_model_cards_recipe(tmp_path: Path) -> None:
    save_pickscore(tmp_path)
    # The PIL backend is what there was when the card was written; torchvision's differs by up to two grey levels.
    processor = AutoProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(processor.image_processor).__name__ == "CLIPImageProcessorPil"
    model = AutoModel.from_pretrained(tmp_path).eval()

    @torch.no_grad()
    def official(prompt: str, images: list[Image.Image]) -> torch.Tensor:
        options = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        embs = [
            model.get_image_features(**processor(images=images, **options)),
            model.get_text_features(**processor(text=prompt, **options)),
        ]
        embs = [getattr(emb, "pooler_output", emb) for emb in embs]  # transformers 5 wraps them
        image_embs, text_embs = (emb / torch.norm(emb, dim=-1, keepdim=True) for emb in embs)
        return model.logit_scale.exp() * (text_embs @ image_embs.T)[0]

    scorer = load_scorer(f"pickscore:{tmp_path}")
    theirs = torch.stack([official(prompt, PICTURES) for prompt in PROMPTS])
    ours = torch.stack([torch.cat([scorer.score(as_tensor(p), [prompt]) for p in PICTURES]) for prompt in PROMPTS])
    assert (theirs.max(0).values - theirs.min(0).values).min() > 0.1 and np.ptp(theirs.numpy(), axis=1).min() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


class MLP(torch.nn.Module):
    """LAION's head; the published checkpoint is its state dict."""

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            *(torch.nn.Linear(input_size, 1024), torch.nn.Dropout(0.2), torch.nn.Linear(1024, 128)),
            *(torch.nn.Dropout(0.2), torch.nn.Linear(128, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 16)),
            torch.nn.Linear(16, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


CLIP = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 4, "width": 128, "head_width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.slow
def test_aesthetic_is_laions_recipe(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        clip, mlp = spread_out(open_clip.CLIP(**CLIP)), spread_out(MLP(768))
        mlp.state_dict()["layers.0.weight"].mul_(30)  # unit features are small numbers
    torch.save(mlp.state_dict(), tmp_path / "aesthetic-model.pth")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {}}))
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    # What OpenAI's clip.load gives as `preprocess`.
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    parts = [Resize(224, InterpolationMode.BICUBIC), CenterCrop(224), lambda image: image.convert("RGB")]
    preprocess = Compose([*parts, ToTensor(), Normalize(mean, std)])

    @torch.no_grad()
    def official(picture: Image.Image) -> float:
        features = clip.encode_image(preprocess(picture).unsqueeze(0)).numpy()
        features = features / np.expand_dims(np.linalg.norm(features, 2, -1), -1)
        return float(mlp(torch.from_numpy(features).float()))

    scorer = load_scorer(f"aesthetic:{tmp_path},clip=open_clip:local-dir:{tmp_path}")
    theirs = [official(picture) for picture in PICTURES]
    ours = [float(scorer.score(as_tensor(picture), [""])) for picture in PICTURES]
    assert np.ptp(theirs) > 0.05
    assert ours == pytest.approx(theirs, abs=1e-4)
