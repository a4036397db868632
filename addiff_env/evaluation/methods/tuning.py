"""Baselines tuned to an agent on other prompts: rules and best-of-N at its compute, its action shares, its mean NFE.

    addiff tune                            the shipped agent, 64 dev prompts
    addiff tune --agent runs/train/tiny-seed0/agent --limit 128 --metric checker

A rule `threshold:n:tau` runs n steps, looks, refines while the reward model's score is under tau, else stops. Of a grid
of such rules the one with the highest mean score is taken among those that spend no more net FLOPs than the agent does,
where a rule pays for the looks that it reads only. Of best-of-N, N = 2, 3 and 4 are tried, each with as many steps as
the agent's net FLOPs pay for. Nothing is tuned on the prompts of the evaluation: a baseline that was, would be a bound
and no baseline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import (
    Item,
    categories_in_turn,
    check_number,
    id_list_hash,
    load_benchmark,
)
from addiff_env.evaluation.benchmarks.readers import SOURCES
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.registry import AUTO, make_method, usual_price
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.evaluation.methods.search import BestOf
from addiff_env.evaluation.metrics.base import Metric, columns_of, score_pictures
from addiff_env.evaluation.metrics.registry import (
    ModelScore,
    default_metrics,
    margins_of,
    open_metrics,
    primary_score,
    reward_score,
)
from addiff_env.evaluation.statistics.families import at_price
from addiff_env.pipeline import SHIPPED_AGENT, make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.storage.files import keep_first, read_json
from addiff_env.storage.inputs import FILE_SETTINGS, fingerprints
from addiff_env.types import Action

MATCHED = 1.02  # net FLOPs of the agent that a rule may spend
LOOKS = (0.5, 0.75, 1.0)  # shares of the schedule after which rules look
NUMBERS = (2, 3, 4)  # of pictures that best-of-N takes the best of
QUANTILES = (0.1, 0.25, 0.5, 0.75)  # of the agent's final reward scores, at which rules' thresholds lie


@dataclass(frozen=True)
class Measured:
    """What a method does on the tuning prompts; means over pictures."""

    spec: str
    quality: float  # mean of the metric
    net_flops: float
    nfe: float
    shares: tuple[float, ...] = ()  # of the decisions taken; empty where no decisions are taken
    reward_scores: tuple[float, ...] = field(default=(), repr=False)  # of the final pictures


@dataclass(frozen=True)
class Tuning:
    """What ``auto`` stands for, and how it was found."""

    threshold: str
    random: str
    words: str
    best_of: str
    metric: str
    fingerprint: dict[str, Any]  # agent, prompts: what it was measured with
    measured: list[dict[str, Any]]  # every method tried

    def spec(self, auto: str) -> str:
        """The method that one of `AUTO` stands for."""
        return dict(zip(AUTO, (self.threshold, self.random, self.words, self.best_of), strict=True))[auto]


def measure(
    method: Method, env: DiffusionDenoiseVectorEnv, items: Sequence[Item], metrics: Sequence[Metric], metric: str
) -> Measured:
    """Run a method on the tuning prompts; ``env``'s reward model looks at the final pictures.

    Raises:
        ValueError: no picture has a finite ``metric``.
    """
    made = [pair for group in method.make(list(items)) for pair in group]
    pictures = np.stack([result.picture for _, result in made])
    chosen = [item for item, _ in made]
    found = [scores.get(metric) for scores, _ in score_pictures(metrics, pictures, chosen)]
    quality = [value for value in found if value is not None]  # one that is not finite is no measurement
    if not quality:
        raise ValueError(f"none of the {len(found)} tuning pictures of {method.name!r} has a finite {metric}")
    looks = score_pictures([ModelScore("look", reward_score(env.perception), env.perception.device)], pictures, chosen)
    taken = [action for _, result in made for action in result.actions]
    shares = np.bincount(taken, minlength=len(Action)) / len(taken) if taken else np.zeros(0)
    flops, nfe = np.mean([(result.net_flops, result.nfe) for _, result in made], axis=0)
    reward_scores = tuple(scores["look"] for scores, _ in looks if scores)
    return Measured(method.name, float(np.mean(quality)), float(flops), float(nfe), (*shares.tolist(),), reward_scores)


def best_matched(candidates: Sequence[Measured], net_flops: float) -> Measured:
    """The best of those that spend no more than ``net_flops`` (and a little), or the cheapest where none does.

    Raises:
        ValueError: no candidates.
    """
    if not candidates:
        raise ValueError("no rule to choose from")
    affordable = [one for one in candidates if one.net_flops <= MATCHED * net_flops]
    if not affordable:
        return min(candidates, key=lambda one: one.net_flops)
    return max(affordable, key=lambda one: (one.quality, -one.net_flops))


def threshold_grid(env: DiffusionDenoiseVectorEnv, scores: Sequence[float]) -> list[str]:
    """Rules that look after some shares of the schedule and have thresholds at quantiles of ``scores``."""
    steps, warmup = env.config.num_inference_steps, env.config.warmup_steps
    looks = sorted({min(steps - 1, max(warmup, 1, round(share * steps))) for share in LOOKS})
    if not len(scores):
        raise ValueError("the reward model gave none of the agent's tuning pictures a finite score: no rule to tune")
    taus = sorted({round(float(tau), 3) for tau in np.quantile(scores, QUANTILES)})
    return [f"threshold:{look}:{tau:g}" for look in looks for tau in taus]


def best_of_grid(env: DiffusionDenoiseVectorEnv, net_flops: float) -> list[str]:
    """Best-of-N for each N of `NUMBERS`, with the most steps that ``net_flops`` (and a little) pay for.

    Where they pay for none, the cheapest there is.
    """
    found, solver = [], env.backbone.solver
    for number in NUMBERS:
        method = BestOf(FixedSteps(env, 1), number)
        left = MATCHED * net_flops - method.total_flops(0, number, number)
        steps = int(left // (number * env.passes_per_nfe * env.flops_per_call["denoiser"]))
        found += [f"best-of-{number}:{solver}-{steps}"] if steps >= 1 else []
    return found or [f"best-of-{NUMBERS[0]}:{solver}-1"]


def tune(
    env: DiffusionDenoiseVectorEnv,
    agent: Agent,
    items: Sequence[Item],
    metrics: Sequence[Metric],
    metric: str,
    price: float | None = None,
) -> Tuning:
    """Measure the agent, threshold rules and best-of-N on ``items``, which are not those of the evaluation.

    ``price`` is that of an evaluation, for an agent with a price input; None: the middle of its range.

    Raises:
        ValueError: an item that ``metric`` says nothing of.
    """
    _refuse_unmeasured(items, metrics, metric)
    own = measure(make_method(at_price("agent", price), env, agent), env, items, metrics, metric)
    grid = threshold_grid(env, own.reward_scores)
    tried, pictures = (
        [measure(make_method(spec, env), env, items, metrics, metric) for spec in tqdm(specs, "tuning", unit="method")]
        for specs in (grid, best_of_grid(env, own.net_flops))
    )
    fingerprint = tuning_fingerprint(agent, env, items, metric, price)
    rule, several = (best_matched(candidates, own.net_flops).spec for candidates in (tried, pictures))
    kept = [
        {key: value for key, value in asdict(one).items() if key != "reward_scores"} for one in (own, *tried, *pictures)
    ]
    return Tuning(
        rule, random_spec(own.shares), f"words-{max(1, round(own.nfe, 1)):g}", several, metric, fingerprint, kept
    )


def random_spec(shares: Sequence[float]) -> str:
    """The random policy with these shares of continue, stop and refine, to four digits that add up to 1."""
    stop = round(shares[1], 4)
    refine = min(round(shares[2], 4), round(1 - stop, 4))
    return "random:" + ":".join(f"{share:g}" for share in (abs(round(1 - stop - refine, 4)), stop, refine))


def _refuse_unmeasured(items: Sequence[Item], metrics: Sequence[Metric], metric: str) -> None:
    mute = [item.prompt for item in items if metric not in columns_of(metrics, item)]
    if mute:
        raise ValueError(f"{metric!r} says nothing of {len(mute)} tuning prompts, e.g. {mute[0]!r}: name other ones")


def tuning_items(
    name: str,
    limit: int | None,
    benchmark: Sequence[Item],
    root: str | Path | None = None,
    any_length: bool = False,
) -> list[Item]:
    """Items of the first ``limit`` entries of ``name`` that ``benchmark``, the evaluation's whole list, does not hold.

    Lists of short captions have some in common: those are left out before anything is counted, and the categories take
    turns among what is left. Of ``tiny-dev`` that is everything but single objects, of which there are 18 captions.

    Raises:
        ValueError: no prompt is left, or a limit below 1; and as `load_benchmark`.
    """
    check_number("tune.limit", limit)
    taken = {item.prompt for item in benchmark}
    groups: dict[tuple[str, str], list[Item]] = {}  # the pictures of each entry of the list
    for item in load_benchmark(name, root=root, any_length=any_length):
        if item.prompt not in taken:
            groups.setdefault((item.id, item.prompt), []).append(item)
    if not groups:
        raise ValueError(f"every prompt of {name!r} is one of the evaluation's own: name others to tune on")
    in_turn = name not in SOURCES or SOURCES[name].in_turn
    ordered = categories_in_turn(list(groups.values())) if in_turn else list(groups.values())
    return [item for group in ordered[:limit] for item in group]


def tuning_fingerprint(
    agent: Agent, env: DiffusionDenoiseVectorEnv, items: Sequence[Item], metric: str, price: float | None = None
) -> dict[str, Any]:
    """What a tuning depends on."""
    settings = hashlib.sha256(repr(env.config).encode()).hexdigest()[:12]
    prompts = {"prompts": id_list_hash(items), "items": len(items)}
    files = fingerprints({name: getattr(env.config, name) for name in FILE_SETTINGS if name != "prompts"})
    price = usual_price(agent) if price is None else price
    paid = {} if price is None else {"price": price}
    return {"agent": agent.fingerprint, "settings": settings, **prompts, "metric": metric, "contents": files, **paid}


def resolve(specs: Sequence[str], path: Path, fingerprint: dict[str, Any], make: Callable[[], Tuning]) -> list[str]:
    """``specs`` with what `AUTO` stands for in place of it.

    The tuning is kept at ``path``: an interrupted run and every shard go on with the same one. Where several processes
    measure it at once, the first to finish is believed.

    Raises:
        ValueError: the one kept there was measured with another agent, other settings, prompts or metric.
    """
    if not set(specs) & set(AUTO):
        return list(specs)
    if not path.exists():
        keep_first(path, json.dumps(asdict(make()), indent=2) + "\n")
    kept = read_json(path)
    if "stamp" in kept:  # as the first tunings called it
        kept["fingerprint"] = kept.pop("stamp")
    try:
        tuning = Tuning(**kept)
    except TypeError as error:
        raise ValueError(f"{path} was tuned by another release ({error}): delete it to tune again") from error
    known = tuning.fingerprint
    if known != {name: value for name, value in fingerprint.items() if name != "contents" or name in known}:
        raise ValueError(f"{path} was tuned with {known}, not with {fingerprint}: delete it to tune again")
    return [tuning.spec(spec) if spec in AUTO else spec for spec in specs]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="addiff tune", description=__doc__.split("\n")[0])
    parser.add_argument("--agent", default=SHIPPED_AGENT, help="folder of an agent bundle")
    parser.add_argument("--benchmark", default="tiny-dev", help="prompts to tune on; never those of the evaluation")
    parser.add_argument("--limit", type=at_least_one, default=64, help="prompts, categories in turn")
    parser.add_argument("--metric", help="metric to maximise (default: the checker, or hpsv2.1)")
    parser.add_argument("--price", type=float, help="of an evaluation, for an agent with a price input")
    parser.add_argument("--num-envs", type=at_least_one, default=32, help="lanes denoised in one batch")
    options = parser.parse_args(argv)
    agent, items = Agent.from_pretrained(options.agent), load_benchmark(options.benchmark, options.limit)
    env = make_agent_env(agent, options.num_envs)
    metrics, _ = open_metrics([options.metric or default_metrics(items)[0]], env.perception, items)
    metric = primary_score([columns_of(metrics, item) for item in items])
    print(describe(tune(env, agent, items, metrics, metric, options.price)))
    return 0


def describe(tuning: Tuning) -> str:
    """The methods tried, and what to name in ``methods``."""
    worthwhile = margins_of(tuning.metric)["worthwhile"]
    lines = [f"{tuning.metric} (differences below {worthwhile:g} are none), mean NFE, mean net GFLOPs"]
    for one in tuning.measured:
        mark = "*" if one["spec"] in (tuning.threshold, tuning.best_of) else " "
        lines.append(f"{mark} {one['spec']:<20} {one['quality']:8.4f} {one['nfe']:7.2f} {one['net_flops'] / 1e9:9.2f}")
    return "\n".join([*lines, f"methods=[{tuning.threshold},{tuning.random},{tuning.words},{tuning.best_of}]"])
