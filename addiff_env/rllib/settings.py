"""What decides an RLlib run, and where its runners find room."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym

from addiff_env.env.validation import Rule, above, at_least, at_most, below, check_fields, checked, shown
from addiff_env.rllib import checkpoint
from addiff_env.storage.files import read_json, write_whole
from addiff_env.storage.inputs import FILE_SETTINGS, differing, fingerprints

FILE, INPUTS = "settings.json", "inputs"


def _knob(default: Any, text: str, read: Callable[[str], Any] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "read": read})


Number = Annotated[int, at_least(1)]
Seed = Annotated[int, at_least(0), below(2**32)]  # NumPy's, which RLlib seeds, takes no more
PerAction = Annotated[Sequence[float], Rule("of three finite numbers", lambda bias: len(bias) == 3)]


@dataclass(frozen=True)
class Settings:
    """One run; what is not said here is RLlib's default. Every field from the third on is a command line option.

    Raises:
        ValueError: a value that is not allowed; the message names the setting and shows the value.
    """

    env_id: str = "AdDiffusion-Tiny-v0"
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_env_runners: Annotated[int, at_least(0)] = _knob(
        2, "processes that play, each with its own model; 0: in the main process"
    )
    num_envs_per_runner: Number = _knob(16, "lanes denoised in one batch")
    gpus_per_runner: Annotated[float, at_least(0)] | None = _knob(
        None, "default: the cluster's GPUs, shared out evenly, at most one each"
    )
    steps_per_lane: Number = _knob(24, "decisions of every lane per iteration")
    minibatch_size: Number = _knob(192, "decisions")
    num_epochs: Number = _knob(8, "passes over an iteration's decisions")
    learning_rate: Annotated[float, above(0)] = _knob(1e-3, "Adam's")
    clip_param: Annotated[float, above(0)] = _knob(0.2, "how far the new policy's ratio to the old may leave 1")
    gae_lambda: Annotated[float, at_least(0), at_most(1)] = _knob(0.95, "of the generalised advantage estimate")
    entropy_coeff: Annotated[float, at_least(0)] = _knob(0.01, "weight of the entropy bonus")
    hidden: Number = _knob(128, "width of both layers, of policy and value")
    action_bias: PerAction = _knob((1.9, -0.3, -0.5), "initial logits of continue, stop, refine")
    gains: Mapping[str, float] | None = _knob(
        None, 'parts of the observation that weigh more or less, as JSON, e.g. {"clip_image": 0.1}', json.loads
    )
    calibration_steps: Number = _knob(24, "random steps per lane that fix the observation's normalisation")
    seed: Seed = _knob(0, "of weights, prompts, noise and exploration")

    def __post_init__(self) -> None:
        check_fields(self)
        for bias in self.action_bias:
            checked("each of action_bias", bias, float)
        try:
            json.dumps([self.env_kwargs, self.gains])
        except TypeError as error:
            raise ValueError(f"env_kwargs must be JSON-able, got {shown(self.env_kwargs)}: {error}") from error

    @property
    def train_batch_size(self) -> int:
        """Decisions per iteration, over all runners."""
        return max(1, self.num_env_runners) * self.num_envs_per_runner * self.steps_per_lane


def claim(folder: Path, settings: Settings) -> None:
    """Write the settings into the run's folder; one that has a checkpoint already must have the same.

    With them go the fingerprints of the files that they name, whose contents must be the same, too.

    Raises:
        ValueError: it has others; every differing value is named.
    """
    path, ours = folder / FILE, _plain(settings)
    named = _input_settings(settings)
    inputs = fingerprints(named)
    begun = path.is_file() and any(folder.glob(f"{checkpoint.NAME}*"))
    kept = read_json(path) if begun else {}
    known = kept.pop(INPUTS, {})
    theirs = _plain(Settings()) | kept if begun else ours  # older runs lack newer settings
    values = differing(_by_setting(ours), _by_setting(theirs), inputs, known, named)
    if values:
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(values)}); name another folder")
    write_whole(path, json.dumps({**ours, INPUTS: inputs}, indent=2) + "\n")


def _input_settings(settings: Settings) -> dict[str, Any]:
    kwargs = {**gym.spec(settings.env_id).kwargs, **settings.env_kwargs}
    return {f"env_kwargs.{name}": kwargs.get(name) for name in FILE_SETTINGS}


def _by_setting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, those of the environment one by one."""
    rest = {name: value for name, value in values.items() if name != "env_kwargs"}
    return {**rest, **{f"env_kwargs.{name}": value for name, value in values.get("env_kwargs", {}).items()}}


def _plain(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def share_gpus(settings: Settings, nodes: Sequence[Mapping[str, float]]) -> float:
    """GPUs of one env runner on nodes with these resources (``CPU`` and ``GPU``); a runner also takes one CPU.

    Raises:
        ValueError: the runners do not fit: Ray would wait for room forever.
    """
    runners, share = settings.num_env_runners, settings.gpus_per_runner
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
