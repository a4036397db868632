"""Write the shipped prompt files: ``addiff world splits``.

``splits/dev.jsonl``, ``splits/test.jsonl`` and ``splits/final.jsonl`` are the evaluation splits; ``splits/train.txt``
lists distinct training captions, one a line, for training agents. ``final`` is for one run with everything fixed: no
choice is made on it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np

from addiff_env.tiny.prompt_splits import FOLDER, SPLITS, build_split, sample_train_prompt
from addiff_env.tiny.prompts import CATEGORIES

SHARES = (0.06, 0.13, 0.17, 0.07, 0.18, 0.13, 0.13, 0.13)  # of the categories among an agent's training captions


def train_captions(number: int = 6000, seed: int = 0) -> list[str]:
    """Distinct training captions, categories drawn by `SHARES`; the few single objects run out early."""
    rng = np.random.default_rng(seed)
    captions: dict[str, None] = {}
    while len(captions) < number:
        category = str(rng.choice(CATEGORIES, p=SHARES))
        captions.setdefault(sample_train_prompt(rng, category).caption)
    return list(captions)


def main(argv: Sequence[str] | None = None) -> int:
    """Write them; returns the exit status."""
    text = "Write the shipped prompt files, splits/{dev,test,final}.jsonl and splits/train.txt."
    argparse.ArgumentParser(prog="addiff world splits", description=text).parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    for name in SPLITS:  # the last leaves out what the others hold
        text = "".join(json.dumps(row) + "\n" for row in build_split(name))
        (FOLDER / f"{name}.jsonl").write_text(text)
    (FOLDER / "train.txt").write_text("".join(caption + "\n" for caption in train_captions()))
    return 0
