"""The training set: scenes of training prompts, rendered once.

``addiff world train data`` writes ``<work>/pictures.npy`` (N, 64, 64, 3) uint8 and
``<work>/captions.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from addiff_env.storage.commands import command_line
from addiff_env.storage.files import write_whole
from addiff_env.tiny.prompt_splits import sample_train_prompt
from addiff_env.tiny.prompts import CATEGORIES
from addiff_env.tiny.recipes import common
from addiff_env.tiny.scenes import render, sample_scene

# Shares of the categories; the harder ones come more often.
SHARES = (0.05, 0.18, 0.13, 0.06, 0.26, 0.10, 0.11, 0.11)
_CHUNK = 1000


def render_chunk(seed_and_index: tuple[int, int]) -> tuple[list[str], np.ndarray]:
    """Captions and pictures (1000, 64, 64, 3) uint8 of a part of the set."""
    rng = np.random.default_rng(seed_and_index)
    captions, pictures = [], np.empty((_CHUNK, 64, 64, 3), np.uint8)
    for row in range(_CHUNK):
        prompt = sample_train_prompt(rng, str(rng.choice(CATEGORIES, p=SHARES)))
        captions.append(prompt.caption)
        pictures[row] = render(sample_scene(rng, prompt))
    return captions, pictures


def prepare(work: Path, number: int = 80_000, seed: int = 0) -> None:
    """Render ``number`` scenes into ``work``, on all cores; nothing happens if they are there."""
    if (work / "captions.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    jobs = [(seed, chunk) for chunk in range(-(-number // _CHUNK))]
    pictures = np.lib.format.open_memmap(
        work / "pictures.npy", mode="w+", dtype=np.uint8, shape=(len(jobs) * _CHUNK, 64, 64, 3)
    )
    captions: list[str] = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for chunk, (texts, block) in enumerate(pool.imap(render_chunk, jobs)):
            pictures[chunk * _CHUNK : (chunk + 1) * _CHUNK] = block
            captions += texts
    pictures.flush()
    write_whole(work / "captions.json", json.dumps(captions))  # written last: marks the set complete


def load(work: Path) -> tuple[torch.Tensor, list[str]]:
    """Pictures (N, 64, 64, 3) uint8, memory-mapped, and their captions.

    Raises:
        FileNotFoundError: the set was not rendered yet.
    """
    if not (work / "captions.json").exists():
        make = command_line("addiff", "world", "data", "--work", work)
        raise FileNotFoundError(f"{work / 'captions.json'}; run: {make}")
    pictures = np.load(work / "pictures.npy", mmap_mode="c")
    return torch.from_numpy(pictures), json.loads((work / "captions.json").read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """Make them; returns the exit status."""
    args: argparse.Namespace = common.arguments("world data", __doc__ or "", argv, number=80_000)
    prepare(args.work, args.number, args.seed)
    print(f"{len(load(args.work)[1])} scenes in {args.work}")  # which may have been there, more or fewer than asked for
    return 0
