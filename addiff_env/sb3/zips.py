"""Agents as Stable-Baselines3 zips, for those who want them. Such a zip holds pickled objects, which may run any code.

    addiff convert export addiff_env:tiny/weights/agent agent.zip
    addiff convert import agent.zip my-agent --env AdDiffusion-Tiny-v0 --trust-pickle

Agent bundles (`addiff_env.agent`) hold the same policy and run nothing; nothing else in this package opens a zip.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from addiff_env.agent import Agent
from addiff_env.env.validation import preset_of
from addiff_env.loading.paths import looked_at
from addiff_env.loading.weights import reason
from addiff_env.sb3.policies import ALGORITHMS, DenoisePolicy
from addiff_env.sb3.vec_env import make_vec_env


def export_zip(agent: Agent, env: VecEnv, path: str | Path) -> None:
    """Write ``agent`` as a zip that ``PPO.load`` reads; ``env`` gives the spaces. The value network is untrained.

    Raises:
        ValueError: the agent sees other observations than ``env`` makes.
    """
    width = sum(agent.policy.norm.parts.values())
    if env.observation_space.shape != (width,):
        raise ValueError(f"the agent sees {width} numbers, the environment makes {env.observation_space.shape}")
    options = {"parts": dict(agent.policy.norm.parts), "hidden": agent.policy.head.in_features}
    model = PPO(DenoisePolicy, env, n_steps=2, batch_size=2 * env.num_envs, policy_kwargs=options, device="cpu")
    assert isinstance(model.policy, DenoisePolicy)
    model.policy.take(agent.policy)
    model.save(path)


def import_zip(path: str | Path, config: dict[str, Any], trust_pickle: bool = False, algorithm: str = "ppo") -> Agent:
    """The policy of an SB3 zip as an agent; ``config`` is its description (``env`` and what else is known).

    Raises:
        ValueError: ``trust_pickle`` is not set (the file is then not opened at all), or the policy is another one.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not trust_pickle:
        raise ValueError(
            f"{str(path)!r} is an SB3 zip: it holds pickled objects, which can run any code when opened. "
            "If you trust whoever made it, say --trust-pickle (trust_pickle=True); better, ask for an agent bundle"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no SB3 zip {looked_at(path)}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}; known: {', '.join(ALGORITHMS)}")
    learner, policy = ALGORITHMS[algorithm]
    try:
        model = learner.load(path, device="cpu")
    except Exception as error:  # the library unpickles it, so that damage raises whatever its bytes lead to
        raise ValueError(f"{str(path)!r} is no readable SB3 zip of {algorithm!r}: {reason(error)}") from error
    if not isinstance(model.policy, policy):
        raise ValueError(
            f"{str(path)!r} holds a {type(model.policy).__name__}, an agent is made of a {policy.__name__}"
        )
    net = model.policy.export()
    return Agent(net, {**config, "observation": dict(net.norm.parts), "hidden": net.head.in_features})


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    parser = argparse.ArgumentParser(prog="addiff convert", description="Agents to and from Stable-Baselines3 zips.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="agent bundle to SB3 zip")
    export.add_argument("agent", help="folder of an agent bundle")
    export.add_argument("zip", help="file to write")
    importing = commands.add_parser("import", help="SB3 zip to agent bundle")
    importing.add_argument("zip", help="file to read")
    importing.add_argument("agent", help="folder to write")
    importing.add_argument("--env", required=True, help="the environment id that the policy was trained on")
    importing.add_argument("--algorithm", default="ppo", choices=list(ALGORITHMS))
    importing.add_argument("--trust-pickle", action="store_true", help="open the zip, which may run any code")
    options = parser.parse_args(argv)
    _export(options) if options.command == "export" else _import(options)
    return 0


def _export(options: argparse.Namespace) -> None:
    agent = Agent.load(options.agent)
    name, kwargs = agent.environment
    export_zip(agent, make_vec_env(name, 1, **kwargs), options.zip)
    written = options.zip if Path(options.zip).suffix else f"{options.zip}.zip"  # as Stable-Baselines3 names it
    print(f"agent {agent.fingerprint} -> {written}")


def _import(options: argparse.Namespace) -> None:
    preset_of(options.env)
    config = {"env": {"id": options.env, "kwargs": {}}}
    agent = import_zip(options.zip, config, options.trust_pickle, options.algorithm)
    agent.save(options.agent)
    print(f"agent {agent.fingerprint} -> {options.agent}")
