"""What the rows of a run folder were made with, beyond what each row says itself: kept there, and held to.

The first process of a code version that makes rows in a folder leaves ``made-with-<code version>.json``; whoever goes
on, makes another shard or merges has to have the same settings. Methods, further agents and a larger limit may be
added: rows are told apart by method, policy, prompt and seed. Rows of another code version are never taken for ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium as gym

from addiff_env.agent import Agent
from addiff_env.env.config import EnvConfig
from addiff_env.evaluation.benchmarks.items import Item, id_list_hash
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.storage.files import keep_first, read_json
from addiff_env.storage.inputs import FILE_SETTINGS, differing, fingerprints, flatten

CONTROL = {"mask": "full"}  # how the environment of H4's control differs from the agent's
# Settings that change no picture, or that each row states itself.
HARMLESS = (
    *("prompts", "reward", "render_mode", "device", "dtype", "compile", "channels_last", "batch_size"),
    *("decode_memory", "offload"),
)
# Stated where they are set: earlier folders have none.
_LATER = {"negative_prompt": None, "look_precision": "auto", "price_range": None}
WEIGHTS = tuple(name for name in FILE_SETTINGS if name not in HARMLESS)
CONTENTS, WEIGHTS_BEFORE = "contents", "weights"  # of the files that settings name; what earlier releases kept of them
BENCHMARK, MODEL = "benchmark.name", "environment.model"
OTHER_FOLDER = "take another folder: hydra.run.dir=..."
ADDED = ("metrics", "agents")  # named one by one: who goes on need not have all of them


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


def differing_values(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Every value in which two fingerprints differ, in words.

    Of `ADDED` our names alone count, and of those no agent that they have not got. A file that lies elsewhere is the
    same if its contents are, except for the model, by whose name rows are told apart.
    """
    mine, others = ({name: value for name, value in flatten(tree).items() if value != {}} for tree in (ours, theirs))
    names = [name for name in dict.fromkeys([*mine, *others]) if not _may_lack(name, mine, others)]
    now, before = ({name: values[name] for name in names if name in values} for values in (mine, others))
    return differing(now, before, ours.get(CONTENTS, {}), theirs.get(CONTENTS, {}), mine, by_name=[MODEL])


def _may_lack(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    group = name.partition(".")[0]
    if group in (CONTENTS, WEIGHTS_BEFORE):
        return True  # compared by themselves
    if name == BENCHMARK and name not in theirs:
        return True  # earlier releases did not say
    return (group in ADDED and name not in ours) or (group == "agents" and name not in theirs)


def keep_fingerprint(
    folder: Path, fingerprint: Mapping[str, Any], code_version: str, instead: str = OTHER_FOLDER
) -> None:
    """Leave ``fingerprint`` in a folder where ``code_version`` is about to make its first rows; else as `require_same`.

    Of shards that start at the same moment the first is believed.
    """
    keep_first(_path(folder, code_version), json.dumps(fingerprint, indent=2) + "\n")
    require_same(folder, fingerprint, code_version, instead)


def _path(folder: Path, code_version: str) -> Path:
    return folder / f"made-with-{code_version}.json"


def require_same(folder: Path, fingerprint: Mapping[str, Any], code_version: str, instead: str = OTHER_FOLDER) -> None:
    """Check ``fingerprint`` against that of the rows which ``code_version`` made in a folder; without any all is well.

    Raises:
        ValueError: they were made with other settings; every differing value is named.
    """
    path = _path(folder, code_version)
    if not path.exists():
        return
    if differing := differing_values(fingerprint, read_json(path)):
        raise ValueError(f"{folder} holds rows that were made with other settings ({'; '.join(differing)}); {instead}")
