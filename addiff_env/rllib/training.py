"""One RLlib training, from its settings to an agent; goes on from the run folder's checkpoint if there is one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import torch

from addiff_env.agent import Agent, PolicyNet, shareable
from addiff_env.env.validation import at_least, checked
from addiff_env.rllib import checkpoint
from addiff_env.rllib.lanes import Survey, make_lanes, survey
from addiff_env.rllib.settings import Settings, claim, share_gpus
from addiff_env.storage import files as storage

ENV_NAME = "addiff"
PROGRESS = "progress.jsonl"
NUMBERS = ("episode_return_mean", "nfe")  # RLlib's means over the last 100 episodes


def require_ray() -> Any:
    """The module ``ray``.

    Raises:
        ImportError: Ray or its RLlib is not installed.
    """
    try:
        import ray
        import ray.rllib
    except ImportError as error:
        raise ImportError("RLlib needs: pip install 'addiff-env[rllib]', in an environment of its own") from error
    return ray


def make_config(settings: Settings, gpus: float, seen: Survey) -> Any:
    """RLlib's ``PPOConfig`` for these settings, runners with ``gpus`` GPUs each, and what `survey` saw."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.tune.registry import register_env

    from addiff_env.rllib.module import DenoiseModule

    register_env(ENV_NAME, make_lanes)
    model = {
        "parts": seen.norm.parts,
        "norm": seen.norm.state_dict(),
        "hidden": settings.hidden,
        "action_bias": list(settings.action_bias),
    }
    return (
        PPOConfig()
        .environment(ENV_NAME, env_config=_context(settings, gpus))
        .env_runners(
            num_env_runners=settings.num_env_runners,
            num_envs_per_env_runner=settings.num_envs_per_runner,
            num_gpus_per_env_runner=gpus,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,  # the lanes share one denoiser call
            rollout_fragment_length=settings.steps_per_lane,
            sample_timeout_s=3600.0,  # the first sample includes loading the diffusion model
        )
        .learners(num_learners=0)  # the policy is small: it learns in the main process
        .rl_module(rl_module_spec=RLModuleSpec(module_class=DenoiseModule, model_config=model))
        .training(
            lr=settings.learning_rate,
            gamma=seen.reward["gamma"],
            lambda_=settings.gae_lambda,
            train_batch_size_per_learner=settings.train_batch_size,
            minibatch_size=min(settings.minibatch_size, settings.train_batch_size),
            num_epochs=settings.num_epochs,
            entropy_coeff=settings.entropy_coeff,
            clip_param=settings.clip_param,
            grad_clip=0.5,
        )
        .callbacks(on_episode_end=_log_nfe)
        .debugging(seed=settings.seed)
    )


def _context(settings: Settings, gpus: float) -> dict[str, Any]:
    """What `make_lanes` takes; a runner that has a GPU, the only one that Ray lets it see, uses it.

    Runners work in a folder of Ray's choosing; the settings' relative paths are relative to ours.
    """
    device = {"device": "auto"} if gpus else {}
    return {"id": settings.env_id, "kwargs": {**device, **settings.env_kwargs}, "folder": os.getcwd()}


def _log_nfe(*, episode: Any, metrics_logger: Any, **_: Any) -> None:
    metrics_logger.log_value("nfe", float(episode.get_infos(-1)["nfe"]), reduce="mean", window=100)


def wait_for_nodes(number: int, timeout: float = 300.0) -> None:
    """Return when Ray has ``number`` living nodes.

    Raises:
        TimeoutError: it has fewer after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while (alive := len(_living_nodes())) < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray has {alive} of {number} nodes after {timeout:.0f} s")
        time.sleep(1.0)


def _living_nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in require_ray().nodes() if node["Alive"]]


def check_numbers(iterations: int, checkpoint_every: int) -> None:
    """Before Ray is started.

    Raises:
        ValueError: one of them is no integer of at least 1.
    """
    for name, value in (("iterations", iterations), ("checkpoint_every", checkpoint_every)):
        checked(name, value, Annotated[int, at_least(1)])


def train(settings: Settings, folder: str | Path, iterations: int, checkpoint_every: int = 5) -> list[float]:
    """Train in ``folder`` up to ``iterations`` and leave the agent bundle in ``folder/agent``.

    A run that was killed goes on from its last checkpoint, with new episodes. Starts a local Ray where none is running.

    Returns:
        The mean episode return after each iteration of this call; NaN before the first episode has ended.

    Raises:
        ImportError: Ray is not installed; ValueError: the folder holds a run with other settings or files, the runners
        do not fit on Ray's nodes, or as `check_numbers`. FolderBusyError: another process is at work in it.
    """
    check_numbers(iterations, checkpoint_every)
    require_ray()
    folder = Path(folder).resolve()  # Ray's storage takes absolute paths only
    with storage.claim(folder, "an RLlib training"):
        return _train(settings, folder, iterations, checkpoint_every)


def _train(settings: Settings, folder: Path, iterations: int, checkpoint_every: int) -> list[float]:
    claim(folder, settings)
    ray = require_ray()
    if not ray.is_initialized():
        ray.init()
    gpus = share_gpus(settings, _living_nodes())
    seen = _look(settings, gpus)
    found = checkpoint.find(folder)
    # RLlib does not save the lanes: with the old seed, every continuation would play the same episodes again.
    done = len(_progress_lines(folder)) if found else 0
    algorithm = make_config(replace(settings, seed=settings.seed + 1000 * done), gpus, seen).build_algo()
    try:
        if found:
            algorithm.restore_from_path(str(found))
        progress, returns = Progress(folder, algorithm.iteration), []
        while algorithm.iteration < iterations:
            means = algorithm.train()["env_runners"]
            row = progress.add(algorithm.iteration, {name: float(means.get(name, math.nan)) for name in NUMBERS})
            returns.append(row.get("episode_return_mean", math.nan))
            if algorithm.iteration % checkpoint_every == 0 or algorithm.iteration == iterations:
                bundle(algorithm, settings, seen, row).save(folder / "agent")
                checkpoint.save(folder, algorithm.save_to_path)
    finally:
        algorithm.stop()
    return returns


def _look(settings: Settings, gpus: float) -> Survey:
    """`survey` where the runners will be: the main process may have no GPU, or should leave it to them."""
    context = {**_context(settings, gpus), "num_envs": settings.num_envs_per_runner}
    arguments = (context, settings.calibration_steps, settings.seed, settings.gains)
    if not settings.num_env_runners:
        return survey(*arguments)
    ray = require_ray()
    return ray.get(ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(survey).remote(*arguments))


def bundle(algorithm: Any, settings: Settings, seen: Survey, last: Mapping[str, float]) -> Agent:
    """The trained policy with what it was trained on and the means of its last iteration."""
    weights = algorithm.learner_group.get_weights()["default_policy"]
    policy = PolicyNet(seen.norm.parts, settings.hidden)
    policy.load_state_dict({name: torch.as_tensor(weights[f"policy.{name}"]) for name in policy.state_dict()})
    kwargs = shareable(settings.env_kwargs)
    config: dict[str, Any] = {
        "env": {"id": settings.env_id, "kwargs": kwargs},
        "observation": seen.norm.parts,
        "hidden": settings.hidden,
        "backbone": seen.backbone,
        "reward": seen.reward,
        "training": {
            "seed": settings.seed,
            "timesteps": algorithm.iteration * settings.train_batch_size,
            "algorithm": {"name": "rllib_ppo", **asdict(replace(settings, env_kwargs=kwargs))},
            "last_rollout": {name: round(value, 4) for name, value in last.items()},
        },
    }
    return Agent(policy, config)


def describe_kept(folder: Path) -> str:
    """What a run folder's checkpoint holds, in words."""
    kept = folder / checkpoint.NAME
    return f"{kept} is the last checkpoint" if kept.exists() else f"no checkpoint yet in {folder}"


def _progress_lines(folder: Path) -> list[str]:
    path = folder / PROGRESS
    return path.read_text().splitlines(keepends=True) if path.is_file() else []


class Progress:
    """The run's numbers, as lines of ``progress.jsonl`` and for TensorBoard; those after ``iteration`` are dropped."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / PROGRESS
        self.path.write_text("".join(_progress_lines(folder)[:iteration]))
        self.writer = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)

    def add(self, iteration: int, means: Mapping[str, float]) -> dict[str, float]:
        """Write down the finite ones of ``means`` and return them."""
        row = {name: value for name, value in means.items() if math.isfinite(value)}
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **row}) + "\n")
        for name, value in row.items():
            self.writer.add_scalar(f"rollout/{name}", value, iteration)
        self.writer.flush()
        print(f"iteration {iteration}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
        return row
