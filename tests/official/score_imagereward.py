"""Score pictures with the official ImageReward and random weights, inside its own environment.

Usage: score_imagereward.py <BERT folder> <work folder>. The work folder holds ``pairs.json``, a list of [picture,
prompt]; written are ``ImageReward.pt``, the official state dict, and ``scores.json``.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

MED_CONFIG = {  # med_config.json of the official release
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def bare_package(name):
    """A package without running its __init__, which imports training code and other scorers' dependencies."""
    package = types.ModuleType(name)
    package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
    sys.modules[name] = package


def import_official(bert):
    # torchvision may lack its compiled operators, if it was built for another torch; PIL transforms need none of them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    from transformers import BertTokenizer

    load = BertTokenizer.from_pretrained
    BertTokenizer.from_pretrained = lambda name, **options: load(bert, **options)  # the code asks the Hub for it
    bare_package("ImageReward")
    bare_package("ImageReward.models")
    from ImageReward.ImageReward import ImageReward

    return ImageReward


@torch.no_grad()
def randomise(model):
    """Weights that pass signals on, so that scores differ between pictures and prompts."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name or "Norm.weight" in name:
            value.copy_(1 + 0.1 * noise)
        elif value.ndim == 1:
            value.copy_(0.1 * noise)
        else:  # sharper attention than a plain random one, which would average everything away
            gain = 3 if name.endswith("query.weight") else 30 if name == "mlp.layers.0.weight" else 1
            value.copy_(gain * noise / value[0].numel() ** 0.5)


def main():
    bert, work = sys.argv[1], Path(sys.argv[2])
    (work / "med_config.json").write_text(json.dumps(MED_CONFIG))
    model = import_official(bert)(med_config=str(work / "med_config.json"), device="cpu")
    randomise(model)
    model.eval()
    torch.save(model.state_dict(), work / "ImageReward.pt")
    pairs = json.loads((work / "pairs.json").read_text())
    with torch.no_grad():
        scores = [model.score(prompt, str(work / picture)) for picture, prompt in pairs]
    (work / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
