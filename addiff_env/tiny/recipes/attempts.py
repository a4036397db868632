"""Record attempts at training prompts: what a policy can be trained on without a denoiser.

``addiff world train attempts`` denoises prompts of the environment, refines them, denoises them again, and so on. In
each of these attempts every state that a policy may stop in is stopped at, from a copy, and what comes of it is judged
by the exact checker. ``<work>/attempts/chunk_*.npz`` hold a `Walks` each, as its fields, and the prompts with their
seeds; ``addiff train env=tiny_attempts attempts.folder=<work>/attempts`` trains on them. A killed run continues at the
first missing chunk.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import addiff_env
from addiff_env.env.config import EnvConfig
from addiff_env.env.prompts import load_prompts
from addiff_env.perception.scorers import LatentTextReward, load_latent_text_reward
from addiff_env.tiny.attempts import environment_of
from addiff_env.tiny.measures.optimal_stopping import walks_of
from addiff_env.tiny.recipes import common, pairs
from addiff_env.tiny.recipes.endings import FreeLanes, Recorder
from addiff_env.tiny.recipes.generate import hold_configuration, missing_chunks, save_arrays

FIRST_SEED = 2_000_000_000  # far from the evaluation splits' seeds
STREAM = 4242  # of a recipe's seed
REFINED = (0.5, 1.0)  # of the attempts that end satisfied and of those that fail, how many another one follows
MOST_REFINES = 7


def make_chunk(
    lanes: FreeLanes, prompts: Sequence[str], verifier: LatentTextReward, seed: int, chunk: int
) -> dict[str, Any]:
    """The attempts at one chunk's prompts, which, with their seeds, depend on its number only."""
    rng, config = np.random.default_rng([seed, chunk, STREAM]), lanes.config
    captions = [str(p) for p in rng.choice(np.array(prompts, dtype=object), lanes.num_envs, replace=False)]
    seeds = [int(value) for value in rng.integers(FIRST_SEED, 2**31, lanes.num_envs)]
    finishes = [0.0] * (config.finish_steps - 1) + [1.0]
    masks = {config.mask: 1.0}
    recorder = Recorder(lanes, captions, seeds, rng, 0, finishes, REFINED, MOST_REFINES, masks)
    walks = walks_of({"prompt": np.asarray(captions), **recorder.run().arrays()}, verifier)
    return {"prompt": np.asarray(captions), "seed": np.asarray(seeds), **vars(walks)}


def main(argv: Sequence[str] | None = None) -> int:
    """Record what is missing; returns the exit status."""
    args = common.arguments("world train attempts", __doc__ or "", argv, number=4_096, batch=256, dtype="auto")
    pairs.needs(args, "pipeline/vae", "pipeline/unet", "verifier")
    lanes, verifier = _parts(args)
    folder, prompts = args.work / "attempts", load_prompts(lanes.config.prompts)
    settings = {"batch": args.batch, "seed": args.seed, "environment": environment_of(lanes.config)}
    hold_configuration(folder, settings)
    started = time.monotonic()
    for chunk, path in missing_chunks(folder, -(-args.number // args.batch)):
        arrays = make_chunk(lanes, prompts, verifier, args.seed, chunk)
        save_arrays(path, arrays)
        made, rate = len(arrays["ended"]), arrays["ended"].mean()
        print(f"chunk {chunk}  {time.monotonic() - started:.0f} s  {made} attempts, satisfied {rate:.3f}", flush=True)
    return 0


def _parts(args: argparse.Namespace) -> tuple[FreeLanes, LatentTextReward]:
    """Lanes as the embedded id has them, and the verifier that looks at them."""
    weights = {"model": str(args.out / "pipeline"), "scorer": str(args.out / "verifier")}
    config = EnvConfig(**addiff_env.TINY | weights | {"device": args.device, "dtype": args.dtype})
    return FreeLanes(config, args.batch), load_latent_text_reward(config.scorer)
