"""RLlib's PPO on Ray, for several GPUs or nodes: every env runner holds its own diffusion model on its own GPU.

    python -m addiff_env.rllib runs/ray/tiny --num-env-runners 2 --iterations 20
    python -m addiff_env.rllib runs/ray/sd15 --env AdDiffusion-SD15-v0 --num-env-runners 8 --gpus-per-runner 1

Ray pins an older Gymnasium than this package is tested with: give it an environment of its own
(``pip install 'addiff-env[rllib]'``). ``slurm/ray.sbatch`` brings Ray up inside a SLURM allocation. The policy is
RLlib's; agents that `evaluate.py` reads come from ``train_sb3.py``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, VectorWrapper

ENV_NAME = "addiff"
PACKAGE = "addiff_env:"  # before an id: import the package, which registers it; a worker process may not have yet


@dataclass(frozen=True)
class Settings:
    """One run; what is not said here is RLlib's default."""

    env_id: str = "AdDiffusion-Tiny-v0"
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_env_runners: int = 2  # processes that play, each with its own model; 0: in the main process
    num_envs_per_runner: int = 16  # lanes denoised in one batch
    gpus_per_runner: float = 0.0
    steps_per_lane: int = 24  # decisions of every lane per iteration
    minibatch_size: int = 192
    num_epochs: int = 8
    learning_rate: float = 1e-3
    entropy_coeff: float = 0.01
    hidden: int = 128  # width of both layers
    seed: int = 0

    @property
    def train_batch_size(self) -> int:
        """Decisions per iteration, over all runners."""
        return max(1, self.num_env_runners) * self.num_envs_per_runner * self.steps_per_lane


class LeanInfo(VectorWrapper):
    """Only what is a plain array per lane stays in ``info``: RLlib splits it into one dictionary per lane."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Reset; see the environment."""
        observation, info = self.env.reset(**kwargs)
        return observation, _lean(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step; see the environment."""
        *result, info = self.env.step(actions)
        return (*result, _lean(info))


def _lean(info: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in info.items() if not isinstance(value, dict) and name != "_reward"}


def make_lanes(context: Mapping[str, Any]) -> gym.vector.VectorEnv:
    """What an env runner calls: ``id`` and ``kwargs`` of an environment, and ``num_envs`` as RLlib adds it.

    Lanes restart in the step after the one that ended them (Gymnasium's default), which RLlib relies on.
    """
    lanes = gym.make_vec(
        PACKAGE + context["id"].removeprefix(PACKAGE),
        num_envs=context.get("num_envs", 1),
        autoreset_mode=AutoresetMode.NEXT_STEP,
        **context["kwargs"],
    )
    return LeanInfo(lanes)


def make_config(settings: Settings) -> Any:
    """RLlib's ``PPOConfig`` for these settings.

    Raises:
        ImportError: Ray is not installed.
    """
    try:
        from ray.rllib.algorithms.ppo import PPOConfig
        from ray.rllib.connectors.env_to_module import MeanStdFilter
        from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
        from ray.tune.registry import register_env
    except ImportError as error:
        raise ImportError("RLlib needs: pip install 'addiff-env[rllib]', in an environment of its own") from error
    register_env(ENV_NAME, make_lanes)
    model = DefaultModelConfig(fcnet_hiddens=[settings.hidden] * 2, fcnet_activation="tanh", vf_share_layers=False)
    return (
        PPOConfig()
        .environment(ENV_NAME, env_config={"id": settings.env_id, "kwargs": dict(settings.env_kwargs)})
        .env_runners(
            num_env_runners=settings.num_env_runners,
            num_envs_per_env_runner=settings.num_envs_per_runner,
            num_gpus_per_env_runner=settings.gpus_per_runner,
            gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,  # the lanes share one denoiser call
            rollout_fragment_length=settings.steps_per_lane,
            sample_timeout_s=3600.0,  # the first sample includes loading the diffusion model
            env_to_module_connector=lambda *_, **__: MeanStdFilter(),
        )
        .learners(num_learners=0)  # the policy is small: it learns in the main process
        .rl_module(model_config=model)
        .training(
            lr=settings.learning_rate,
            gamma=1.0,  # the reward's
            lambda_=0.95,
            train_batch_size_per_learner=settings.train_batch_size,
            minibatch_size=min(settings.minibatch_size, settings.train_batch_size),
            num_epochs=settings.num_epochs,
            entropy_coeff=settings.entropy_coeff,
            clip_param=0.2,
            grad_clip=0.5,
        )
        .debugging(seed=settings.seed)
    )


def wait_for_nodes(number: int, timeout: float = 300.0) -> None:
    """Return when Ray has ``number`` living nodes.

    Raises:
        TimeoutError: it has fewer after ``timeout`` seconds.
    """
    import ray

    deadline = time.monotonic() + timeout
    while (alive := sum(bool(node["Alive"]) for node in ray.nodes())) < number:
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray has {alive} of {number} nodes after {timeout:.0f} s")
        time.sleep(1.0)


def train(settings: Settings, folder: Path, iterations: int, checkpoint_every: int = 5) -> list[float]:
    """Train in ``folder``; returns each iteration's mean episode return. Goes on from the folder's checkpoint."""
    folder = folder.resolve()  # Ray's storage takes absolute paths only
    folder.mkdir(parents=True, exist_ok=True)
    algorithm = make_config(settings).build_algo()
    returns: list[float] = []
    try:
        if (folder / "checkpoint").exists():
            algorithm.restore_from_path(str(folder / "checkpoint"))
        while algorithm.iteration < iterations:
            result = algorithm.train()
            returns.append(float(result["env_runners"]["episode_return_mean"]))
            _log(folder, algorithm.iteration, returns[-1])
            if algorithm.iteration % checkpoint_every == 0 or algorithm.iteration == iterations:
                algorithm.save_to_path(str(folder / "checkpoint"))
    finally:
        algorithm.stop()
    return returns


def _log(folder: Path, iteration: int, mean_return: float) -> None:
    row = {"iteration": iteration, "episode_return_mean": mean_return}
    with (folder / "progress.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"iteration {iteration}: mean return {mean_return:.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="PPO by RLlib on Ray.")
    parser.add_argument("folder", type=Path, help="checkpoint and progress; the same folder goes on where it stopped")
    parser.add_argument("--env", default=Settings.env_id, help="environment id")
    parser.add_argument("--kwargs", default="{}", help='environment settings as JSON, e.g. \'{"device": "cuda"}\'')
    parser.add_argument("--address", default=None, help="a running Ray ('auto' or host:port); without one, a local Ray")
    parser.add_argument("--nodes", type=int, default=1, help="nodes to wait for")
    parser.add_argument("--num-env-runners", type=int, default=Settings.num_env_runners)
    parser.add_argument("--num-envs-per-runner", type=int, default=Settings.num_envs_per_runner)
    parser.add_argument("--gpus-per-runner", type=float, default=Settings.gpus_per_runner)
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    options = parser.parse_args(arguments)
    settings = Settings(
        env_id=options.env,
        env_kwargs=json.loads(options.kwargs),
        num_env_runners=options.num_env_runners,
        num_envs_per_runner=options.num_envs_per_runner,
        gpus_per_runner=options.gpus_per_runner,
        seed=options.seed,
    )
    make_config(settings)  # says what is missing before anything is started
    import ray

    ray.init(address=options.address)
    try:
        wait_for_nodes(options.nodes)
        train(settings, options.folder, options.iterations)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
