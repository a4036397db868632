"""Recorded trajectories as Minari datasets, for offline reinforcement learning (``pip install 'addiff-env[offline]'``).

    addiff record addiff/tiny-random-v0 --episodes 200
    addiff record addiff/tiny-agent-v0 --episodes 200 --agent addiff_env:tiny/weights/agent

An episode holds observations (T + 1, width), actions (T,) as carried out, rewards (T,), and per step its prompt, seed,
NFE and action mask in ``infos``. Read one back with ``minari.load_dataset`` or `read_episodes`; its
``recover_environment()`` makes the environment again, with every setting.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from addiff_env.agent import Agent
from addiff_env.env.validation import preset_of
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import claim_file, told_when_full

RANDOM_SHARES = (0.8, 0.08, 0.12)  # continue, stop, refine of the random policy
Act = Callable[[Any, np.ndarray], np.ndarray]  # observations (B, width), masks (B, 3) -> actions (B,)


@dataclass
class Trajectory:
    """One whole episode of T decisions."""

    prompt: str
    seed: int
    observations: list[np.ndarray] = field(default_factory=list)  # T + 1, (width,) float32 each
    actions: list[int] = field(default_factory=list)  # T, as carried out
    rewards: list[float] = field(default_factory=list)  # T
    nfe: list[int] = field(default_factory=list)  # T + 1, denoiser evaluations so far
    masks: list[np.ndarray] = field(default_factory=list)  # T + 1, (3,) bool: admissible actions
    truncated: bool = False  # it was cut short by a limit of steps


def random_policy(rng: np.random.Generator, shares: Sequence[float] = RANDOM_SHARES) -> Act:
    """Draws admissible actions with these shares."""

    def act(observations: Any, masks: np.ndarray) -> np.ndarray:
        weights = masks * np.asarray(shares)
        return np.array([rng.choice(len(row), p=row / row.sum()) for row in weights])

    return act


def collect(env: DiffusionDenoiseVectorEnv, act: Act, pairs: Sequence[tuple[str, int]]) -> Iterator[Trajectory]:
    """Play every (prompt, seed) once, as many at a time as there are lanes, and yield whole episodes in order.

    Every pair is given to a lane beforehand: taking whatever ends first would favour short episodes. One that is not
    finite before its first decision has no episode, and is left out with a warning.

    Raises:
        ValueError: lanes that restart by themselves.
    """
    if env.autoreset_mode != AutoresetMode.DISABLED:
        raise ValueError(f"recording needs lanes that wait (autoreset DISABLED), got {env.autoreset_mode}")
    for start in range(0, len(pairs), env.num_envs):
        yield from filter(_was_played, _play(env, act, pairs[start : start + env.num_envs]))


def _was_played(episode: Trajectory) -> bool:
    if not episode.actions:
        whose = f"the prompt {episode.prompt!r} with seed {episode.seed}"
        warnings.warn(f"{whose} was not finite in its warm-up: it has no episode and is left out", stacklevel=2)
    return bool(episode.actions)


def _play(env: DiffusionDenoiseVectorEnv, act: Act, pairs: Sequence[tuple[str, int]]) -> list[Trajectory]:
    episodes = [Trajectory(prompt, int(seed)) for prompt, seed in pairs]
    padded = [*pairs, *[pairs[-1]] * (env.num_envs - len(pairs))]
    observation, info = env.reset(options={"prompt": [p for p, _ in padded], "seed": [int(s) for _, s in padded]})
    running = ~(env.done | env.fault)  # who broke down in its warm-up has nothing to decide
    _note(episodes, running, observation, info)
    while running[: len(episodes)].any():
        before = running
        observation, reward, terminated, truncated, info = env.step(act(observation, info["action_mask"]))
        for lane, episode in enumerate(episodes):
            if before[lane]:
                episode.actions.append(int(info["action_taken"][lane]))
                episode.rewards.append(float(reward[lane]))
                episode.truncated = bool(truncated[lane] and not terminated[lane])
        _note(episodes, before, observation, info)
        running = before & ~(terminated | truncated)
    return episodes


def _note(episodes: list[Trajectory], lanes: np.ndarray, observation: np.ndarray, info: dict[str, Any]) -> None:
    """Remember what is seen of those ``lanes`` (B,) bool that have an episode."""
    for lane, episode in enumerate(episodes):
        if lanes[lane]:
            episode.observations.append(observation[lane].copy())
            episode.nfe.append(int(info["nfe"][lane]))
            episode.masks.append(info["action_mask"][lane].astype(bool))


def write_dataset(name: str, env: DiffusionDenoiseVectorEnv, episodes: Sequence[Trajectory], algorithm: str) -> Any:
    """Store whole episodes as the Minari dataset ``name`` (``<namespace>/<dataset>-v<N>``) and return it.

    Raises:
        ImportError: Minari is not installed; ValueError: no episodes, or the name is taken.
    """
    minari = _minari()
    if not episodes:
        raise ValueError("no episodes to write")
    buffers = [_buffer(minari, number, episode) for number, episode in enumerate(episodes)]
    return minari.create_dataset_from_buffers(
        dataset_id=name,
        buffer=buffers,
        env=_single_spec(env),
        observation_space=env.single_observation_space,
        action_space=env.single_action_space,
        algorithm_name=algorithm,
        description=f"Denoising decisions on {env.config.model}; prompts and seeds are in the infos.",
    )


def check_free(name: str) -> None:
    """See whether `write_dataset` will take ``name``: asked before hours of recording, nothing is lost.

    Raises:
        ImportError: Minari is not installed; ValueError: no name of a dataset, or it is taken.
    """
    minari = _minari()
    minari.dataset.minari_dataset.parse_dataset_id(name)
    if (path := minari.storage.get_dataset_path(name)).exists():
        raise ValueError(f"there is a dataset {name} already, in {path}: choose another name or version")


def _single_spec(env: DiffusionDenoiseVectorEnv) -> Any:
    """What makes the one-lane environment with the settings of ``env``; None where it was made without an id."""
    if env.spec is None:
        return None
    spec = copy.deepcopy(gym.spec(env.spec.id))
    spec.kwargs = asdict(env.config) | {"reward": dict(vars(env.reward_config))}
    return spec


def _buffer(minari: Any, number: int, episode: Trajectory) -> Any:
    steps = len(episode.actions)
    last = np.arange(steps) == steps - 1
    infos = {
        "prompt": np.array([episode.prompt.encode()] * (steps + 1)),
        "seed": np.full(steps + 1, episode.seed, np.int64),
        "nfe": np.array(episode.nfe, np.int64),
        "action_mask": np.stack(episode.masks),
    }
    return minari.data_collector.EpisodeBuffer(
        id=number,
        seed=episode.seed,
        observations=np.stack(episode.observations),
        actions=np.array(episode.actions, np.int64),
        rewards=np.array(episode.rewards),
        terminations=last & (not episode.truncated),
        truncations=last & episode.truncated,
        infos=infos,
    )


def read_episodes(name: str) -> Iterator[Trajectory]:
    """The episodes of a dataset that `write_dataset` wrote.

    Raises:
        ImportError: Minari is not installed; FileNotFoundError: no such dataset.
    """
    for data in _minari().load_dataset(name).iterate_episodes():
        infos = data.infos
        prompt = infos["prompt"][0]
        yield Trajectory(
            prompt.decode() if isinstance(prompt, bytes) else str(prompt),
            int(infos["seed"][0]),
            list(data.observations),
            [int(action) for action in data.actions],
            [float(reward) for reward in data.rewards],
            [int(nfe) for nfe in infos["nfe"]],
            [np.asarray(mask, bool) for mask in infos["action_mask"]],
            bool(data.truncations[-1]),
        )


def _minari() -> Any:
    try:
        import minari
        import minari.data_collector
        import minari.dataset.minari_dataset
        import minari.storage
    except ImportError as error:
        raise ImportError("Minari datasets need: pip install 'addiff-env[offline]'") from error
    return minari


def main(argv: Sequence[str] | None = None) -> int:
    """Record; returns the exit status."""
    parser = argparse.ArgumentParser(prog="addiff record", description="Record trajectories into a Minari dataset.")
    parser.add_argument("name", help="<namespace>/<dataset>-v<N>")
    parser.add_argument("--env", default="AdDiffusion-Tiny-v0", help="environment id, where no agent is given")
    parser.add_argument("--agent", default=None, help="folder of an agent bundle; without one actions are random")
    parser.add_argument("--episodes", type=at_least_one, default=100)
    parser.add_argument("--num-envs", type=at_least_one, default=16, help="lanes denoised in one batch")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, initial noises and random actions")
    options = parser.parse_args(argv)
    check_free(options.name)
    place = _minari().storage.get_dataset_path(options.name)
    with (
        interruptible(lambda: "a dataset is written whole, nothing is kept"),
        claim_file(place, "offline", "choose another name or version"),
        told_when_full(place),
    ):
        check_free(options.name)  # another recording may have ended just now
        _record(options)
    return 0


def _record(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(options.seed)
    agent = Agent.from_pretrained(options.agent) if options.agent else None
    name, kwargs = agent.environment if agent else (options.env, {})
    paid = {"reward": agent.config["reward"]} if agent and "reward" in agent.config else {}  # as training left it
    preset_of(name)
    modes = {"num_envs": options.num_envs, "autoreset_mode": AutoresetMode.DISABLED}
    env = gym.make_vec(name, **modes, **kwargs | paid).unwrapped
    assert isinstance(env, DiffusionDenoiseVectorEnv)
    prompts = rng.choice(np.array(env.prompts, dtype=object), size=options.episodes)
    pairs = [(str(prompt), int(rng.integers(2**31))) for prompt in prompts]
    episodes = list(collect(env, agent.act if agent else random_policy(rng), pairs))
    write_dataset(options.name, env, episodes, agent.fingerprint if agent else "random")
    print(f"{len(episodes)} episodes, {sum(len(e.actions) for e in episodes)} decisions -> {options.name}")
