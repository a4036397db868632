"""One RLlib training, from its configuration to an agent; goes on from the run folder's checkpoint if there is one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from omegaconf import DictConfig

import addiff_env
from addiff_env.agent import Agent, PolicyNet, shareable
from addiff_env.env.training_settings import as_mapping, env_settings
from addiff_env.rllib import checkpoint
from addiff_env.rllib.lanes import Survey, make_lanes, survey
from addiff_env.rllib.settings import check_settings, claim, share_gpus, train_batch_size
from addiff_env.storage import files as storage
from addiff_env.storage.jsonl import append_objects, read_objects

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


def make_config(cfg: DictConfig, gpus: float, surveyed: Survey, seed: int) -> Any:
    """RLlib's ``PPOConfig`` for this configuration, runners with ``gpus`` GPUs each, and what `survey` saw."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.tune.registry import register_env

    from addiff_env.rllib.module import DenoiseModule

    register_env(ENV_NAME, make_lanes)
    model = {
        "parts": surveyed.norm.parts,
        "norm": surveyed.norm.state_dict(),
        "hidden": cfg.policy.hidden,
        "action_bias": list(cfg.policy.action_bias),
    }
    return (
        PPOConfig()
        .environment(ENV_NAME, env_config=_context(cfg, gpus))
        .env_runners(
            num_env_runners=cfg.rllib.num_env_runners,
            num_envs_per_env_runner=cfg.num_envs,
            num_gpus_per_env_runner=gpus,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,  # the lanes share one denoiser call
            rollout_fragment_length=cfg.algorithm.n_steps,
            sample_timeout_s=3600.0,  # the first sample includes loading the diffusion model
        )
        .learners(num_learners=0)  # the policy is small: it learns in the main process
        .rl_module(rl_module_spec=RLModuleSpec(module_class=DenoiseModule, model_config=model))
        .training(**ppo_options(cfg))
        .callbacks(on_episode_end=_log_nfe)
        .debugging(seed=seed)
    )


def ppo_options(cfg: DictConfig) -> dict[str, Any]:
    """The group ``algorithm`` by RLlib's names; schedules are linear in decisions."""
    options, batch = cfg.algorithm, train_batch_size(cfg)
    return {
        "lr": _schedule(options.learning_rate, options.learning_rate_end, options.total_timesteps),
        "entropy_coeff": _schedule(options.ent_coef, options.ent_coef_end, options.total_timesteps),
        "gamma": options.gamma,
        "lambda_": options.gae_lambda,
        "clip_param": options.clip_range,
        "vf_loss_coeff": options.vf_coef,
        "grad_clip": options.max_grad_norm,
        "num_epochs": options.n_epochs,
        "minibatch_size": min(options.batch_size, batch),
        "train_batch_size_per_learner": batch,
    }


def _schedule(first: float, last: float, decisions: float) -> float | list[list[float]]:
    return first if first == last else [[0, first], [decisions, last]]


def _context(cfg: DictConfig, gpus: float) -> dict[str, Any]:
    """What `make_lanes` takes; a runner that has a GPU, the only one that Ray lets it see, uses it.

    Runners work in a folder of Ray's choosing; the settings' relative paths are relative to ours.
    """
    device = {"device": "auto"} if gpus else {}
    return {"id": cfg.env.id, "kwargs": {**device, **env_settings(cfg)}, "folder": os.getcwd()}


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


def train(cfg: DictConfig, run: str | Path) -> list[float]:
    """Train as ``cfg`` (configs/train_rllib.yaml) says, in the folder ``run``, and leave the agent in ``run/agent``.

    A run that was killed goes on from its last checkpoint, with new episodes.

    Returns:
        The mean episode return after each iteration of this call; NaN before the first episode has ended.

    Raises:
        ImportError: Ray is not installed; ValueError: a value that no training can have or that RLlib's has no use
        for, a folder that holds a run with another configuration or files, or runners that do not fit on Ray's nodes.
        FolderBusyError: another process is at work in it. TimeoutError: as `wait_for_nodes`.
    """
    check_settings(cfg)
    require_ray()
    run = Path(run).expanduser().resolve()  # Ray's storage takes absolute paths only
    with storage.claim(run, "an RLlib training"), storage.told_when_full(run):
        claim(run, cfg)
        with running_ray(cfg):
            return _train(cfg, run)


@contextmanager
def running_ray(cfg: DictConfig) -> Iterator[None]:
    """Ray at ``rllib.address`` with all of its nodes, let go of afterwards; one that is up already is left as it is."""
    ray = require_ray()
    mine = not ray.is_initialized()
    if mine:
        ray.init(address=cfg.rllib.address)
    try:
        wait_for_nodes(cfg.rllib.nodes)
        yield
    finally:
        if mine:
            ray.shutdown()


def _train(cfg: DictConfig, run: Path) -> list[float]:
    gpus = share_gpus(cfg, _living_nodes())
    surveyed = _survey(cfg, gpus)
    found = checkpoint.find(run)
    # RLlib does not save the lanes: with the old seed, every continuation would play the same episodes again.
    done = len(read_objects(run / PROGRESS)) if found else 0
    algorithm = make_config(cfg, gpus, surveyed, cfg.seed + 1000 * done).build_algo()
    iterations = math.ceil(cfg.algorithm.total_timesteps / train_batch_size(cfg))
    try:
        if found:
            algorithm.restore_from_path(str(found))
        progress, returns = Progress(run, algorithm.iteration), []
        while algorithm.iteration < iterations:
            means = algorithm.train()["env_runners"]
            row = progress.add(algorithm.iteration, {name: float(means.get(name, math.nan)) for name in NUMBERS})
            returns.append(row.get("episode_return_mean", math.nan))
            if algorithm.iteration % cfg.rllib.checkpoint_every == 0 or algorithm.iteration == iterations:
                bundle(algorithm, cfg, surveyed, row).save(run / "agent")
                checkpoint.save(run, algorithm.save_to_path)
    finally:
        algorithm.stop()
    return returns


def _survey(cfg: DictConfig, gpus: float) -> Survey:
    """`survey` where the runners will be: the main process may have no GPU, or should leave it to them."""
    context = {**_context(cfg, gpus), "num_envs": cfg.num_envs}
    arguments = (context, cfg.calibration_steps, cfg.seed, as_mapping(cfg.policy)["gains"])
    if not cfg.rllib.num_env_runners:
        return survey(*arguments)
    ray = require_ray()
    return ray.get(ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1)(survey).remote(*arguments))


def bundle(algorithm: Any, cfg: DictConfig, surveyed: Survey, last: Mapping[str, float]) -> Agent:
    """The trained policy with what it was trained on and the means of its last iteration."""
    weights = algorithm.learner_group.get_weights()["default_policy"]
    policy = PolicyNet(surveyed.norm.parts, cfg.policy.hidden)
    policy.load_state_dict({name: torch.as_tensor(weights[f"policy.{name}"]) for name in policy.state_dict()})
    lanes = {"num_env_runners": cfg.rllib.num_env_runners, "num_envs": cfg.num_envs}
    config: dict[str, Any] = {
        "env": {"id": cfg.env.id, "kwargs": shareable(env_settings(cfg))},
        "observation": surveyed.norm.parts,
        "hidden": cfg.policy.hidden,
        "backbone": surveyed.backbone,
        "reward": surveyed.reward,
        "training": {
            "seed": cfg.seed,
            "timesteps": algorithm.iteration * train_batch_size(cfg),
            "release": addiff_env.__version__,
            "algorithm": {**as_mapping(cfg.algorithm), "name": "rllib_ppo", **lanes},
            "last_rollout": {name: round(value, 4) for name, value in last.items()},
        },
    }
    return Agent(policy, config)


def describe_kept(folder: Path) -> str:
    """What a run folder's checkpoint holds, in words."""
    kept = folder / checkpoint.NAME
    return f"{kept} is the last checkpoint" if kept.exists() else f"no checkpoint yet in {folder}"


class Progress:
    """The run's numbers, as lines of ``progress.jsonl`` and for TensorBoard; those after ``iteration`` are dropped."""

    def __init__(self, folder: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / PROGRESS
        kept = read_objects(self.path)[:iteration]
        storage.write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.writer = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)

    def add(self, iteration: int, means: Mapping[str, float]) -> dict[str, float]:
        """Write down the finite ones of ``means`` and return them."""
        row = {name: value for name, value in means.items() if math.isfinite(value)}
        append_objects(self.path, [{"iteration": iteration, **row}])
        for name, value in row.items():
            self.writer.add_scalar(f"rollout/{name}", value, iteration)
        self.writer.flush()
        print(f"iteration {iteration}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
        return row
