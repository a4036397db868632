"""What an RLlib run is configured by (configs/train_rllib.yaml), and where its runners find room."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from addiff_env.env.reward import RewardConfig
from addiff_env.env.training_settings import (
    Count,
    NotNegative,
    check_discount,
    check_numbers,
    differing_values,
    env_inputs,
    env_settings,
    resolved,
)
from addiff_env.env.validation import at_least, preset_of
from addiff_env.rllib import checkpoint
from addiff_env.storage.commands import spelled
from addiff_env.storage.files import read_json, read_yaml, write_whole
from addiff_env.storage.inputs import fingerprints

CONFIG_FILE, INPUTS_FILE = "config.yaml", "inputs.json"
COSMETIC = ("rllib.gpus_per_runner", "rllib.checkpoint_every", "rllib.address", "rllib.nodes")  # decide no result

ALLOWED: dict[str, Any] = {
    "rllib.num_env_runners": Annotated[int, at_least(0)],
    "rllib.gpus_per_runner": NotNegative | None,
    "rllib.checkpoint_every": Count,
    "rllib.address": str | None,
    "rllib.nodes": Count,
}
# Of the groups: the one value that RLlib's trainer takes, and what it does not do.
UNUSED: dict[str, tuple[Any, str]] = {
    "algorithm.name": ("ppo", "has no other algorithm, and no action masks in training"),
    "algorithm.gae_lambda_end": (None, "keeps algorithm.gae_lambda constant"),
    "reward.normalisation": ("fixed", "has no running scales of the scores"),
    "reward.target_nfe": (None, "searches no price for a number of evaluations"),
    "reward.dual_rate": (None, "searches no price for a number of evaluations"),
    "reward.baselines": (None, "counts no reward from baselines"),
    "attempts.folder": (None, "replays no recorded attempts"),
    "prompts.stages": ([], "has no curriculum"),
    "prompts.held_out.source": (None, "looks at no held-out prompts"),
    "prompts.held_out.number": (None, "looks at no held-out prompts"),
}


def check_settings(cfg: DictConfig) -> None:
    """Before Ray is started and any model loaded.

    Raises:
        ValueError: a value that is not allowed, or one that RLlib's trainer has no use for; the message names the
            setting and shows the value.
    """
    check_numbers(cfg, ALLOWED)
    for name, (only, reason) in UNUSED.items():
        if (value := OmegaConf.select(cfg, name)) != only:
            raise ValueError(f"{name}={value}: RLlib's trainer {reason}; it takes {spelled(only)} alone")
    reward = env_settings(cfg).get("reward") or preset_of(cfg.env.id).get("reward") or {}
    check_discount(cfg, RewardConfig.from_dict(reward).gamma)


def train_batch_size(cfg: DictConfig) -> int:
    """Decisions per iteration, over all runners."""
    return max(1, cfg.rllib.num_env_runners) * cfg.num_envs * cfg.algorithm.n_steps


def claim(folder: Path, cfg: DictConfig) -> None:
    """Write the configuration into the run's folder; one that has a checkpoint already must have the same.

    With it go the fingerprints of the files that it names, whose contents must be the same, too.

    Raises:
        ValueError: it has another one; every differing value is named.
    """
    named = env_inputs(cfg)
    inputs = fingerprints(named)
    if values := _differing_from_kept(folder, cfg, inputs, named):
        raise ValueError(
            f"{folder} holds a run with another configuration ({'; '.join(values)}); "
            "name another folder (hydra.run.dir=...)"
        )
    write_whole(folder / INPUTS_FILE, json.dumps(inputs, indent=2) + "\n")
    write_whole(folder / CONFIG_FILE, resolved(cfg))


def _differing_from_kept(
    folder: Path, cfg: DictConfig, inputs: Mapping[str, str], named: Mapping[str, Any]
) -> list[str]:
    kept, known = folder / CONFIG_FILE, folder / INPUTS_FILE
    if not kept.is_file() or not any(folder.glob(f"{checkpoint.NAME}*")):
        return []
    theirs = OmegaConf.create(read_yaml(kept))
    contents = read_json(known) if known.is_file() else {}
    return differing_values(cfg, theirs, inputs, contents, named, COSMETIC)


def share_gpus(cfg: DictConfig, nodes: Sequence[Mapping[str, float]]) -> float:
    """GPUs of one env runner on nodes with these resources (``CPU`` and ``GPU``); a runner also takes one CPU.

    Raises:
        ValueError: the runners do not fit: Ray would wait for room forever.
    """
    runners, share = cfg.rllib.num_env_runners, cfg.rllib.gpus_per_runner
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if not runners:
        return 0.0  # the main process sees every GPU
    if share is None:
        # Down to the ten-thousandths that Ray counts in: 0.1429 seven times would be more than one GPU.
        share = math.floor(10_000 / math.ceil(runners / gpus)) / 10_000 if gpus else 0.0
    if (room := sum(_room(node, share) for node in nodes)) < runners:
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        raise ValueError(
            f"{runners} env runners with 1 CPU and {share:g} GPUs each: there is room for {room} on "
            f"{len(nodes)} node(s) with {cpus} CPUs and {gpus} GPUs"
        )
    return share


def _room(node: Mapping[str, float], share: float) -> int:
    cpus, gpus = int(node.get("CPU", 0)), int(node.get("GPU", 0))
    if not share:
        return cpus
    return min(cpus, gpus * int(1 / share) if share <= 1 else int(gpus // share))
