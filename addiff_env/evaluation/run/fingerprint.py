"""What the rows of a run depend on, beyond what each row says itself; `made_with` beside it keeps and compares it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import gymnasium as gym

from addiff_env.agent import Agent
from addiff_env.env.config import EnvConfig
from addiff_env.evaluation.benchmarks.items import Item, id_list_hash
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.evaluation.run.made_with import BENCHMARK, CONTENTS, HARMLESS, differing_values
from addiff_env.storage.inputs import FILE_SETTINGS, fingerprints

CONTROL = {"mask": "full"}  # how the environment of H4's control differs from the agent's
# Stated where they are set: earlier folders have none.
_LATER = {"negative_prompt": None, "look_precision": "auto", "price_range": None}
WEIGHTS = tuple(name for name in FILE_SETTINGS if name not in HARMLESS)


def run_fingerprint(
    agents: Mapping[str, Agent],
    overrides: Mapping[str, Any],
    metrics: Sequence[str],
    benchmark: Sequence[Item],
    options: MethodOptions,
    benchmark_name: str = "",
) -> dict[str, Any]:
    """What a run's rows depend on, JSON-able.

    Args:
        agents: by the name of their rows; the first is the one whose controls are made.
        overrides: settings of the environment that differ from the agents' own.
        metrics: their settings.
        benchmark: the whole list, whatever the limit.
        options: of the methods.
        benchmark_name: its name, or its file.

    Raises:
        ValueError: agents of different environments; every differing value is named.
    """
    first, environment = next(iter(agents.values())), common_environment(agents, overrides)
    names = {setting.partition(":")[0]: setting for setting in metrics}
    files = {f"environment.{name}": environment[name] for name in WEIGHTS}
    files |= {f"metrics.{name}": setting.partition(":")[2] for name, setting in names.items()}  # not the name itself
    files |= {f"method_options.{name}": value for name, value in asdict(options).items()}
    fingerprint = {
        "environment": environment,
        "control": CONTROL,
        CONTENTS: {**fingerprints(files), BENCHMARK: _items_hash(benchmark)},
        "metrics": names,
        "benchmark": {
            "name": benchmark_name,
            "pictures": len(benchmark),
            "id_list_sha256": id_list_hash(benchmark),
        },
        "method_options": asdict(options),
        "agent": first.fingerprint,
        "agents": {name: agent.fingerprint for name, agent in agents.items()},
    }
    return json.loads(json.dumps(fingerprint))


def common_environment(agents: Mapping[str, Agent], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, preset included, of the environment that all ``agents`` act in; raises as `run_fingerprint`."""
    settings = {name: environment_of(agent, overrides) for name, agent in agents.items()}
    first, *others = settings
    for other in others:
        if differing := differing_values(settings[other], settings[first]):
            raise ValueError(f"{first} and {other} act in different environments ({'; '.join(differing)})")
    return settings[first]


def environment_of(agent: Agent, overrides: Mapping[str, Any], env_id: str | None = None) -> dict[str, Any]:
    """What decides how an agent's pictures come out: id (its own, or ``env_id``) and settings without harmless ones."""
    own, kwargs = agent.environment
    name = own if env_id is None else env_id
    config = asdict(EnvConfig(**{**gym.spec(name).kwargs, **kwargs, **overrides}))
    left_out = {*HARMLESS, *(key for key, value in _LATER.items() if config[key] == value)}
    return {"id": name, **{key: value for key, value in config.items() if key not in left_out}}


def _items_hash(items: Sequence[Item]) -> str:
    """All that a benchmark's files say of their items, what is asked of the pictures among it."""
    digest = sha256()
    for item in items:
        values = asdict(item)
        values["facts"] = values.pop("num_requirements")  # its name when the first runs were hashed
        digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]
