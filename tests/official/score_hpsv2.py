"""Score pictures with the official HPS v2 code and random weights, inside its own environment.

Usage: score_hpsv2.py <work folder>. The work folder holds ``config.json``, the architecture in open_clip's words, and
``pairs.json``, a list of [picture, prompt]; written are ``HPS_v2.1_compressed.pt``, a checkpoint as it is published,
and ``scores.json``. The code is the official one from the picture file to the score; only what it takes for ViT-H-14 is
smaller, and the LAION weights, which it loads before its own, are the same random ones.
"""

import json
import os
import sys
import types
from pathlib import Path

import torch


def import_official(work):
    # torchvision may lack its compiled operators, if it was built for another torch; the transforms need none of them.
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    turtle = types.ModuleType("turtle")  # imported by mistake, and missing where Python has no Tk
    turtle.forward = None
    sys.modules["turtle"] = turtle
    os.environ["HPS_ROOT"] = str(work)
    from hpsv2 import img_score
    from hpsv2.src.open_clip import factory

    return img_score, factory


@torch.no_grad()
def randomise(model):
    """Weights that pass signals on, so that scores differ between pictures and prompts."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 0:
            continue  # the temperature, which is no part of the score
        if "ln_" in name and name.endswith("weight"):
            value.copy_(1 + 0.1 * noise)
        elif value.ndim == 1:
            value.copy_(0.1 * noise)
        elif "embedding" in name:
            value.copy_(0.5 * noise)
        else:
            value.copy_(noise / value[0].numel() ** 0.5)


def main():
    work = Path(sys.argv[1])
    img_score, factory = import_official(work)
    factory._MODEL_CONFIGS["ViT-H-14"] = json.loads((work / "config.json").read_text())
    checkpoint = str(work / "HPS_v2.1_compressed.pt")
    model = factory.create_model("ViT-H-14")
    randomise(model)
    torch.save({"state_dict": model.state_dict(), "epoch": 0}, checkpoint)
    factory.download_pretrained = lambda *_, **__: checkpoint
    pairs = json.loads((work / "pairs.json").read_text())
    scores = [float(img_score.score(str(work / name), prompt, cp=checkpoint)[0]) for name, prompt in pairs]
    (work / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
