"""What plain fixed-step inference scores on each prompt and seed: the terminal reward can be counted from there.

    addiff baselines runs/baselines/tiny.jsonl --env AdDiffusion-Tiny-v0 --steps 10 --seeds 2

The file is JSON lines: a header with the configuration, then a line per (prompt, seed) with the raw scores, so that
the reward's weights and scales may change without computing anything again. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

from addiff_env.diffusion.backbones import denoise, initial_noise
from addiff_env.env.prompts import check_prompt, shorten
from addiff_env.env.reward import RewardConfig, quality
from addiff_env.env.validation import at_least, check_seed, checked, preset_of
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.storage.commands import FAILED, command_line, interruptible, json_argument
from addiff_env.storage.files import claim_file, told_when_full, write_whole
from addiff_env.storage.inputs import fingerprint
from addiff_env.storage.jsonl import read_objects

FORMAT_VERSION = 3
ENDS_ONLY = 2  # the version that knew weights by both ends of their files; still read, and completed
# The settings of an environment that decide what fixed-step inference scores, and those of them that name weights.
DECISIVE = ("model", "revision", "lora", "solver", "guidance_scale", "height", "width", "clip", "scorer")
WEIGHTS = ("model", "lora", "clip", "scorer")
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth"}
_PROBE = 2**16  # bytes looked at, at either end of a file


def baseline_configuration(
    env: DiffusionDenoiseVectorEnv, steps: int | None, version: int = FORMAT_VERSION
) -> dict[str, Any]:
    """Everything that the cached scores depend on, JSON-able, as files of a format ``version`` state it.

    Raises:
        ValueError: a stochastic solver: a prompt and a seed do not fix what it makes.
    """
    if env.config.eta > 0:
        raise ValueError(
            f"baselines are of deterministic fixed steps, got eta {env.config.eta!r}: set it to 0, or use no baselines"
        )
    settings = {name: getattr(env.config, name) for name in DECISIVE}
    if env.config.negative_prompt is not None:  # files of earlier releases have none
        settings["negative_prompt"] = env.config.negative_prompt
    contents = weights_fingerprint if version == ENDS_ONLY else fingerprint
    weights = {f"{name}_weights": contents(settings[name]) for name in WEIGHTS}
    return {"format_version": version, "steps": steps, "dtype": env.backbone.dtype_name, **settings, **weights}


def weights_fingerprint(setting: str | None) -> str | None:
    """12 hex digits that change with the local weights a setting names (a retrained model keeps its path).

    Names, sizes and both ends of every weight file count. None where nothing is local. Of what comes from the Hub only
    the diffusion model's revision is known (a setting of its own): an encoder or scorer that changes there under the
    same id goes unnoticed, and the cache has to be removed by hand.
    """
    places = [Path(resolve_model(name)) for name in _possible_paths(setting or "")]
    files = {file for place in places if place.exists() for file in (place.rglob("*") if place.is_dir() else [place])}
    found = sorted(file for file in files if file.suffix in _WEIGHT_FILES and file.is_file())
    digest = hashlib.sha256()
    for file in found:
        digest.update(f"{file.parent.name}/{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_PROBE))
            stream.seek(-min(_PROBE, file.stat().st_size), 2)
            digest.update(stream.read())
    return digest.hexdigest()[:12] if found else None


def _possible_paths(setting: str) -> Iterator[str]:
    """What may be a path in ``scorer:file,option=folder`` and its like: every part, and what follows its colons."""
    for part in re.split("[,=@]", setting):
        pieces = part.split(":")
        yield from filter(None, (":".join(pieces[start:]) for start in range(len(pieces))))


def configuration_hash(configuration: dict[str, Any]) -> str:
    """The first 12 hex digits of the SHA-256 of the configuration's canonical JSON."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:12]


class BaselineCache:
    """Raw scores (CLIP, reward model) of fixed-step pictures by (prompt, seed)."""

    def __init__(self, configuration: dict[str, Any]) -> None:
        self.configuration = configuration
        self.scores: dict[tuple[str, int], tuple[float, float]] = {}
        self.failed: list[tuple[str, int]] = []  # whose numbers were not finite when they were made
        self._seeds: dict[str, list[int]] = {}

    def put(self, prompt: str, seed: int, clip_score: float, reward_score: float) -> None:
        """Remember one picture's scores."""
        seed = check_seed(seed)
        if (prompt, seed) not in self.scores:
            self._seeds.setdefault(prompt, []).append(seed)
        self.scores[prompt, seed] = clip_score, reward_score

    def seeds(self, prompt: str) -> list[int]:
        """The seeds that ``prompt`` was scored with.

        Raises:
            ValueError: none; the message names the prompt.
        """
        if prompt not in self._seeds:
            raise ValueError(f"no baseline for the prompt {prompt!r}; add it with: addiff baselines")
        return self._seeds[prompt]

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of ``prompts`` that were not scored with any seed, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._seeds]

    def quality(self, prompts: Sequence[str], seeds: Sequence[int], config: RewardConfig) -> np.ndarray:
        """Qualities (B,) of the fixed-step pictures under the reward's present weights and scales.

        Raises:
            ValueError: a (prompt, seed) that was not scored; the message shows it.
        """
        rows = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            if (prompt, int(seed)) not in self.scores:
                raise ValueError(f"no baseline for the prompt {prompt!r} with seed {seed}; known: {self.seeds(prompt)}")
            rows.append(self.scores[prompt, int(seed)])
        clip, reward = np.array(rows, dtype=np.float64).reshape(-1, 2).T
        return quality(clip, reward, config)

    @classmethod
    def load(cls, path: str | Path, env: DiffusionDenoiseVectorEnv) -> BaselineCache:
        """Read the cache made for this environment, whatever its number of fixed steps.

        Raises:
            FileNotFoundError: no such file, with the command that makes it; ValueError: it is damaged, or stale: it was
            made for another configuration, and every differing value is named; or the solver is stochastic.
        """
        path = Path(resolve_model(path))
        if not path.is_file():
            make = command_line("addiff", "baselines", path)
            raise FileNotFoundError(f"no baselines {looked_at(path)}; make them with: {make}")
        lines = read_objects(path)
        return cls.parse(path, lines, _expected(path, lines, env))

    @classmethod
    def parse(cls, path: Path, lines: list[dict[str, Any]], expected: dict[str, Any]) -> BaselineCache:
        """The cache of ``lines`` of ``path``, if its header is the ``expected`` configuration; raises as `load`."""
        _refuse_stale(path, _header(path, lines), expected)
        cache = cls(expected)
        for number, line in enumerate(lines[1:], 2):
            try:
                scores = float(line["clip_score"]), float(line["reward_score"])
                cache.put(line["prompt"], int(line["seed"]), *scores)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a baseline: {str(line)[:80]}") from error
            if not np.isfinite(scores).all():
                raise ValueError(f"{path}:{number}: scores that are not finite: {str(line)[:200]}")
        return cache


def _header(path: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The configuration that ``lines`` of ``path`` were made with."""
    configuration = lines[0].get("configuration") if lines else None
    if not isinstance(configuration, dict):
        raise ValueError(f"{path} has no header with a configuration; it is not a file of baselines")
    return configuration


def _expected(
    path: Path, lines: list[dict[str, Any]], env: DiffusionDenoiseVectorEnv, steps: int | None = None
) -> dict[str, Any]:
    """The configuration that ``lines`` have to be of, by default with their own number of steps."""
    stated = _header(path, lines)
    version = ENDS_ONLY if stated.get("format_version") == ENDS_ONLY else FORMAT_VERSION
    return baseline_configuration(env, stated.get("steps") if steps is None else steps, version)


def _moved(name: str, cached: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a setting names the same files in another place; a bare word is a name, and no place."""
    own, place = f"{name}_weights", cached.get(name)
    known = name in WEIGHTS and cached.get("format_version") == FORMAT_VERSION and cached.get(own) is not None
    return known and cached[own] == expected.get(own) and isinstance(place, str) and "/" in place


def _refuse_stale(path: Path, cached: dict[str, Any], expected: dict[str, Any]) -> None:
    names = sorted(set(cached) | set(expected))
    differing = [
        name for name in names if cached.get(name) != expected.get(name) and not _moved(name, cached, expected)
    ]
    if differing:
        values = "; ".join(f"{name}: cached {cached.get(name)!r}, now {expected.get(name)!r}" for name in differing)
        raise ValueError(
            f"{path} is stale, it was made for another configuration ({values}); remove it or name another"
        )


# --------------------------------------------------------------------------- making them


def score_fixed_steps(
    env: DiffusionDenoiseVectorEnv, steps: int, pairs: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, int, float, float]]:
    """Yield (prompt, seed, CLIP score, reward-model score) of ``steps``-step pictures, in the order of ``pairs``.

    Both scores of a picture whose numbers are not finite are NaN.
    """
    schedule = env.backbone.schedule(steps, env.latent_shape, env.config.solver)
    for start in range(0, len(pairs), env.config.batch_size):
        prompts, seeds = (list(column) for column in zip(*pairs[start : start + env.config.batch_size], strict=True))
        noise = initial_noise(env.backbone, env.latent_shape, seeds)
        latents = denoise(
            env.backbone,
            schedule,
            prompts,
            noise,
            env.config.guidance_scale,
            negative_prompt=env.config.negative_prompt,
        )
        pictures = env.backbone.decode(latents)
        features = env.perception.look(pictures.nan_to_num(0, 1, 0), prompts)
        scores = torch.stack([features.clip_score, features.reward_score], 1).double()  # (B, 2)
        scores[~(torch.isfinite(pictures).flatten(1).all(1) & torch.isfinite(scores).all(1))] = torch.nan
        yield from zip(prompts, seeds, *scores.T.tolist(), strict=True)


def compute_baselines(
    path: str | Path, env: DiffusionDenoiseVectorEnv, steps: int, prompts: Sequence[str], seeds: Sequence[int]
) -> BaselineCache:
    """Score every prompt with every seed and keep the scores in ``path``; what is there already is not repeated.

    Pictures whose numbers are not finite are left out, and named in the cache's ``failed``.

    Raises:
        ValueError: ``path`` holds the baselines of another configuration; steps or seeds that are none; or as
            `baseline_configuration`. TypeError: a prompt that is no string.
        FolderBusyError: another process writes to it.
    """
    steps = checked("steps", steps, Annotated[int, at_least(1)])
    prompts = [check_prompt(prompt) for prompt in prompts]
    seeds = [check_seed(seed) for seed in seeds]
    path = Path(path).expanduser()
    with claim_file(path, "baseline_cache"):
        return _complete(path, env, steps, prompts, seeds)


def _complete(
    path: Path, env: DiffusionDenoiseVectorEnv, steps: int, prompts: Sequence[str], seeds: Sequence[int]
) -> BaselineCache:
    lines = read_objects(path) if path.is_file() else []
    configuration = _expected(path, lines, env, steps) if lines else baseline_configuration(env, steps)
    header = {"key": configuration_hash(configuration), "configuration": configuration}
    cache = BaselineCache.parse(path, lines or [header], configuration)
    wanted = [(prompt, seed) for prompt in dict.fromkeys(prompts) for seed in seeds]
    missing = [pair for pair in wanted if pair not in cache.scores]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written anew, which also removes an unfinished last line.
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines or [header]))
    with told_when_full(path), path.open("a", encoding="utf-8") as file:
        scored = score_fixed_steps(env, steps, missing)
        for prompt, seed, clip, reward in tqdm(scored, total=len(missing), desc=f"{steps} steps", unit="picture"):
            if math.isnan(clip):
                cache.failed.append((prompt, seed))
                continue
            cache.put(prompt, seed, clip, reward)
            row = {"prompt": prompt, "seed": seed, "clip_score": clip, "reward_score": reward}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    return cache


def main(argv: Sequence[str] | None = None) -> int:
    """Score and keep; returns the exit status: 3 where pictures had numbers that are not finite."""
    text = "Score fixed-step inference once, for rewards relative to it."
    parser = argparse.ArgumentParser(prog="addiff baselines", description=text)
    parser.add_argument("path", help="the JSON lines file to write or to complete")
    parser.add_argument("--env", default="AdDiffusion-Tiny-v0", help="environment id")
    parser.add_argument(
        "--kwargs", type=json_argument, default={}, help='environment settings as JSON, e.g. \'{"device": "cuda"}\''
    )
    parser.add_argument("--steps", type=int, default=None, help="fixed steps (default: the environment's schedule)")
    parser.add_argument("--seeds", type=int, default=2, help="initial noises per prompt: seeds 0, 1, ...")
    parser.add_argument("--limit", type=int, default=None, help="only the first prompts")
    options = parser.parse_args(argv)
    for name in ("seeds", "limit"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    preset_of(options.env)
    env = gym.make_vec(options.env, num_envs=1, **options.kwargs).unwrapped
    assert isinstance(env, DiffusionDenoiseVectorEnv)
    steps = env.config.num_inference_steps if options.steps is None else options.steps
    with interruptible(lambda: f"what was scored is kept in {options.path}"):
        cache = compute_baselines(options.path, env, steps, env.prompts[: options.limit], range(options.seeds))
    print(f"{len(cache.scores)} baselines of {steps} steps -> {options.path}")
    for prompt, seed in cache.failed:
        where = f"{shorten(prompt)}, seed {seed}, {steps} steps in {env.backbone.dtype_name}"
        print(f"failed: {where}: numbers that are not finite; try another dtype", file=sys.stderr)
    return FAILED if cache.failed else 0
