"""Which methods a run makes: names expanded, agents named, what is tuned filled in, what cannot be had left out.

What came of the names is kept in ``methods.json``, so that a merge knows which rows have to be there: a run whose
shards all died before the last method is not whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from addiff_env.agent import Agent
from addiff_env.diffusion.backbones import StableDiffusionBackbone
from addiff_env.env.prices import price_at
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.evaluation.methods.registry import AUTO, is_agent
from addiff_env.evaluation.metrics.registry import missing
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.loading.paths import PACKAGE_PREFIX, resolve_model
from addiff_env.storage.files import alone_in, read_json, write_whole

ALL = "all"
METRICS = "left_out_metrics"  # in methods.json
DISTILLED = ("lcm-4", "sdxl-turbo-1")  # need weights of their own: of "all", left out where those are missing
PRICES = (0.0, -1.0, -0.5, 0.5, 1.0)  # of "all", positions in an agent's range of prices
_DIFFUSION = {
    "ddim": (5, 10, 20, 30, 50),
    "dpmpp_2m": (5, 10, 20),
    "euler": (10, 20),
    "unipc": (5, 10, 20),
    "pndm": (10, 20),
}
# Each kind at a small and at a large budget, so that its front reaches past an agent's cost.
_SEARCH = ["fk-2:ddim-5", "fk-4:ddim-10", "rbf-10:ddim-5", "rbf-40:ddim-10", "restart-15:ddim-10", "restart-40:ddim-20"]
_FLOW = {"euler": (1, 2, 4, 8, 16)}  # of distilled flow models


# --------------------------------------------------------------------------- agents


def named_agents(single: str, several: Sequence[str]) -> dict[str, Agent]:
    """Agents by the name of their rows: ``agent``, or where there are several ``agent-s<training seed>`` each.

    Raises:
        FileNotFoundError, ValueError: as `Agent.from_pretrained`; one of several that does not say its training seed,
            or a seed twice.
    """
    bundles = {name: Agent.from_pretrained(name) for name in (several or [single])}
    if len(bundles) < len(several):
        raise ValueError(f"an agent is named twice: {', '.join(several)}")
    if len(bundles) == 1:
        return dict(zip(("agent",), bundles.values(), strict=True))
    named: dict[str, Agent] = {}
    for bundle, agent in bundles.items():
        seed = agent.config.get("training", {}).get("seed")
        if seed is None:
            raise ValueError(f"agents=[...] are told apart by their training seeds, {bundle!r} does not say its own")
        if f"agent-s{seed}" in named:
            raise ValueError(f"agents=[...] are told apart by their training seeds, {bundle!r} is the second of {seed}")
        named[f"agent-s{seed}"] = agent
    return named


# --------------------------------------------------------------------------- names


def asked_methods(
    wanted: str | Sequence[str], env: DiffusionDenoiseVectorEnv, options: MethodOptions, tunable: bool
) -> list[str]:
    """The names of ``wanted``: a list, or ``all``.

    Raises:
        ValueError: another word than ``all``, or a name twice.
    """
    if isinstance(wanted, str):
        if wanted != ALL:
            raise ValueError(f"methods must be a list of names or {ALL!r}, got {wanted!r}")
        return all_methods(env, options, tunable)
    twice = sorted({name for name in wanted if list(wanted).count(name) > 1})
    if twice:
        raise ValueError(f"methods named more than once: {', '.join(twice)}")
    return list(wanted)


def all_methods(env: DiffusionDenoiseVectorEnv, options: MethodOptions, tunable: bool) -> list[str]:
    """Every method that applies to the environment's model, the agent last.

    ``tunable``: there are prompts to tune on, so that ``:auto`` applies. Methods by a LoRA or another model are there
    where the model is one that they are published for, or ``options`` name the weights.
    """
    backbone, config = env.backbone, env.config
    diffusion = isinstance(backbone, StableDiffusionBackbone)
    solvers = _DIFFUSION if diffusion else _FLOW
    names = [f"{solver}-{steps}" for solver, numbers in solvers.items() for steps in numbers]
    if isinstance(backbone, StableDiffusionBackbone):
        names += [] if backbone.is_xl else ["sag-10", "attend-and-excite-10"]
        names += _distilled(config.model, options)
    own = backbone.solver
    names += [f"best-of-{number}:{own}-{10 if diffusion else 4}" for number in (2, 3, 4)]
    names += _SEARCH if own == "ddim" else []
    names += [f"oracle-stop:{own}-{config.num_inference_steps}", *(AUTO if tunable else ())]
    return [*names, *_agent_at_prices(config.price_range)]


def _agent_at_prices(price_range: Sequence[float] | None) -> list[str]:
    """The agent, or with a range of prices the agent at some of them: in the middle first, which verdicts are about."""
    if price_range is None or price_range[0] == price_range[1]:
        return ["agent"]
    return [at_price("agent", float(f"{price:.6g}")) for price in price_at(price_range, PRICES)]


def _distilled(model: str, options: MethodOptions) -> list[str]:
    published = not model.startswith(PACKAGE_PREFIX) and not Path(resolve_model(model)).exists()
    named = {"lcm-4": options.lcm_lora is not None, "sdxl-turbo-1": Path(resolve_model(options.sdxl_turbo)).exists()}
    return [name for name in DISTILLED if published or named[name]]


# --------------------------------------------------------------------------- making them


@dataclass
class Plan:
    """The methods by the names asked for (several where there are several agents), and why others are left out."""

    made: dict[str, list[Method]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[Method]:
        """All methods, in order; two names that stand for one method give it once."""
        return list({method.name: method for group in self.made.values() for method in group}.values())


def plan(
    asked: Sequence[str],
    make: Callable[[str], list[Method]],
    tuned: Callable[[Sequence[str]], Sequence[str]],
    optional: Iterable[str] = (),
) -> Plan:
    """Make the methods ``asked`` for; what needs no tuning first, as tuning draws pictures.

    Args:
        asked: names, also of `AUTO`.
        make: the methods of a name.
        tuned: what those of `AUTO` stand for, in their order.
        optional: names that are left out where their weights or packages are missing.

    Raises:
        FileNotFoundError, ImportError: what others need is missing; ValueError: as `make` and `tuned`.
    """
    found, may_lack = Plan(), set(optional)

    def add(name: str, stands_for: str) -> None:
        try:
            found.made[name] = make(stands_for)
        except (FileNotFoundError, ImportError) as error:
            if name not in may_lack:
                raise missing(f"method {name!r}", error) from error
            found.left_out[name] = str(error)

    for name in asked:
        if name not in AUTO:
            add(name, name)
    automatic = [name for name in asked if name in AUTO]
    for name, stands_for in zip(automatic, tuned(automatic) if automatic else (), strict=True):
        add(name, stands_for)
    found.made = {name: found.made[name] for name in asked if name in found.made}
    return found


# --------------------------------------------------------------------------- what is kept for the merge


def keep_plan(folder: Path, wanted: str | Sequence[str], found: Plan, skipped: Mapping[str, str] | None = None) -> None:
    """Add to ``methods.json`` what came of the names and why metrics were ``skipped``; what earlier runs kept stays."""
    names = {name: [method.name for method in group] for name, group in found.made.items()}
    with alone_in(folder):
        kept = read_plan(folder)
        made = {**kept["made"], **names}
        left_out = {name: why for name, why in {**kept["left_out"], **found.left_out}.items() if name not in names}
        made = {name: group for name, group in made.items() if name not in left_out}
        whole = [*names, *found.left_out] if wanted == ALL else kept[ALL]
        metrics = {**kept.get(METRICS, {}), **(skipped or {})}
        plan = {"made": made, "left_out": left_out, METRICS: metrics, ALL: whole}
        write_whole(RunFolder(folder).methods, json.dumps(plan, indent=2) + "\n")


def left_out(folder: Path) -> list[str]:
    """What was asked for and could not be had, with the reason: for the report."""
    kept = read_plan(folder)
    methods = [f"method {name!r}: {why}" for name, why in kept["left_out"].items()]
    return methods + [f"metric {name!r}: {why}" for name, why in kept.get(METRICS, {}).items()]


def read_plan(folder: Path) -> dict[str, Any]:
    """What `keep_plan` kept; nothing where no process began to make rows."""
    path = RunFolder(folder).methods
    return read_json(path) if path.exists() else {"made": {}, "left_out": {}, ALL: []}


def expected_methods(folder: Path, wanted: str | Sequence[str], controls: Sequence[str]) -> list[str]:
    """Names of the methods whose rows a whole run has, in order; ``controls`` where the agent is among them.

    Raises:
        ValueError: a name that no process of this folder was asked for.
    """
    kept: Mapping[str, Any] = read_plan(folder)
    asked = kept[ALL] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in asked if name not in kept["made"] and name not in kept["left_out"]]
    if unknown or not asked:
        raise ValueError(f"no process was asked for {', '.join(unknown) or wanted} in {folder}: make its rows first")
    names = [name for spec in asked if spec in kept["made"] for name in kept["made"][spec]]
    return list(dict.fromkeys([*names, *(controls if any(map(is_agent, asked)) else ())]))
