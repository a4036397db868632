"""The acceptance test: does an agent use what it may do, and does it beat what one can do by hand?

    addiff acceptance runs/train/tiny-seed0/agent
    addiff acceptance runs/train/tiny-seed{0,1,2}/agent --limit 256 --json > acceptance.json
    addiff acceptance runs/train/tiny-seed0/agent --opponents runs/opponents.json     kept for the next agent

On the embedded world's dev split, in the agent's own environment and paid by its own reward, the agent is compared with
every constant policy (stop after k steps for every k, always continue, refine always, random with the agent's own
action shares) and with the best threshold rule: run n steps, look, refine while the reward model's score is under tau,
else stop. n and tau are those with the highest return on training prompts. All start from the same initial noise.

An agent passes where each action has at least 3% of its decisions, its NFE have a standard deviation above 2, its
return lies above that of every constant policy (the 95% interval of each difference excludes zero), and its mean return
is not below the threshold rule's. Pictures of a single prompt have no interval: what it would decide is n/a, and no
pass. The exit status is 1 if an agent does not pass, 2 if one cannot be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from addiff_env.agent import Agent
from addiff_env.env.baseline_cache import baseline_configuration
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.methods.rollouts import (
    TAUS,
    Episode,
    PolicyRun,
    RuleChoice,
    choose_rule,
    constants,
    run_policy,
)
from addiff_env.evaluation.methods.rule_policies import RandomPolicy, ThresholdRule
from addiff_env.evaluation.report.text import aligned
from addiff_env.evaluation.statistics.bootstrap import Interval, interval, resampled_means
from addiff_env.pipeline import make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.storage.files import write_whole
from addiff_env.types import ACTIONS

LEAST_SHARE = 0.03  # of each action among all decisions
LEAST_SPREAD = 2.0  # standard deviation of NFE over pictures


def tuning_items(env: DiffusionDenoiseVectorEnv, number: int, seed: int) -> list[Item]:
    """``number`` of the environment's training prompts, with seeds."""
    rng = np.random.default_rng(seed)
    prompts = rng.choice(np.array(env.prompts, dtype=object), size=min(number, len(env.prompts)), replace=False)
    return [Item(str(prompt), int(rng.integers(2**31)), "training") for prompt in prompts]


# --------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Condition:
    """One thing that is asked of an agent."""

    name: str
    required: str
    measured: str
    passed: bool | None  # None: the pictures cannot tell


def difference(ours: np.ndarray, theirs: np.ndarray, prompts: Sequence[str]) -> Interval:
    """Mean of ``ours - theirs`` (N,) over pictures, with its 95% interval; pictures of one prompt stay together.

    Of a single prompt the interval's ends are NaN: nothing can be resampled.
    """
    if len(set(prompts)) < 2:
        return Interval(float(np.mean(ours - theirs)), math.nan, math.nan, np.empty(0))
    names = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    owner = np.array([names[prompt] for prompt in prompts])
    sums, counts = np.bincount(owner, weights=ours - theirs), np.bincount(owner).astype(float)
    draws = resampled_means({"both": np.stack([sums, counts])[:, None]})["both"]  # (D, 2)
    return interval(float(np.mean(ours - theirs)), draws[:, 0] / draws[:, 1])


def conditions(
    agent: PolicyRun, constant: Sequence[PolicyRun], rule: PolicyRun, prompts: Sequence[str]
) -> list[Condition]:
    """What the agent has to meet, and whether it does."""
    shares, spread = agent.shares, float(agent.nfe.std())
    used = [
        Condition(f"uses {name}", f">= {LEAST_SHARE:.0%}", f"{share:.1%}", bool(share >= LEAST_SHARE))
        for name, share in zip(ACTIONS, shares, strict=True)
    ]
    varies = Condition("NFE vary: standard deviation", f"> {LEAST_SPREAD:g}", f"{spread:.2f}", spread > LEAST_SPREAD)
    apart = [(difference(agent.values, other.values, prompts), other.name) for other in constant]
    nearest, name = min(apart, key=lambda pair: pair[0].estimate if math.isnan(pair[0].low) else pair[0].low)
    ahead = None if math.isnan(nearest.low) else nearest.low > 0
    above = Condition(f"return above every constant, nearest {name}", "> 0", in_words(nearest), ahead)
    best = difference(agent.values, rule.values, prompts)
    not_below = Condition(f"return not below {rule.name}", ">= 0", in_words(best), best.estimate >= 0)
    return [*used, varies, above, not_below]


def in_words(number: Interval) -> str:
    """A difference with the ends of its interval, or that a single prompt has none."""
    return _with_ends(number.estimate, *_ends(number))


def _ends(number: Interval) -> tuple[float | None, float | None]:
    return (None, None) if math.isnan(number.low) else (number.low, number.high)


def _with_ends(estimate: float, low: float | None, high: float | None) -> str:
    return f"{estimate:+.4f} " + ("[n/a: one prompt]" if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]")


@dataclass(frozen=True)
class AcceptanceReport:
    """Everything that was found out about one agent."""

    agent: str
    fingerprint: str
    dtype: str
    rule: RuleChoice
    policy_runs: Sequence[PolicyRun]  # the agent's first
    prompts: Sequence[str]
    conditions: Sequence[Condition]
    price: float | None = None  # of an evaluation, for agents with a price input

    @property
    def passed(self) -> bool:
        """Whether every condition is known to be met."""
        return all(condition.passed for condition in self.conditions)

    def rows(self) -> list[dict[str, Any]]:
        """One row of numbers per policy."""
        return [self._row(run) for run in self.policy_runs]

    def _row(self, run: PolicyRun) -> dict[str, Any]:
        ahead = difference(self.policy_runs[0].values, run.values, self.prompts)
        return {
            "policy": run.name,
            "return": float(run.values.mean()),
            "agent_ahead": [ahead.estimate, *_ends(ahead)],
            "success": run.success,
            "nfe_mean": float(run.nfe.mean()),
            "nfe_std": float(run.nfe.std()),
            "shares": dict(zip(ACTIONS, run.shares.tolist(), strict=True)),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        numbers = {"pictures": len(self.prompts), "rows": self.rows(), "passed": self.passed}
        head = {"agent": self.agent, "fingerprint": self.fingerprint, "dtype": self.dtype, "rule": asdict(self.rule)}
        paid = {} if self.price is None else {"price": self.price}
        return head | paid | numbers | {"conditions": [asdict(condition) for condition in self.conditions]}

    def text(self) -> str:
        """The table and the verdicts."""
        rule = self.rule
        head = f"{self.agent} ({self.fingerprint}), {len(self.prompts)} pictures of tiny-dev, {self.dtype}"
        head += "" if self.price is None else f", price {self.price:g}"
        chosen = (
            f"threshold rule: look after n = {rule.look_at} steps, tau = {rule.tau:g}: the best of {rule.rules} on "
            f"{rule.prompts} training prompts (return {rule.value:.4f})"
        )
        titles = ["policy", "return", "agent ahead by", "success", "NFE", "NFE sd", "cont/stop/refine"]
        table = _aligned([titles, *(_cells(row) for row in self.rows())])
        words = {True: "pass", False: "FAIL", None: "n/a"}
        verdicts = _aligned([[c.name, c.required, c.measured, words[c.passed]] for c in self.conditions])
        return "\n".join([head, chosen, "", table, "", verdicts])


def _cells(row: dict[str, Any]) -> list[str]:
    estimate, low, high = row["agent_ahead"]
    return [
        row["policy"],
        f"{row['return']:.4f}",
        _with_ends(estimate, low, high),
        f"{100 * row['success']:.1f}%",
        f"{row['nfe_mean']:.1f}",
        f"{row['nfe_std']:.1f}",
        "/".join(f"{100 * share:.0f}" for share in row["shares"].values()),
    ]


def _aligned(lines: list[list[str]]) -> str:
    return "\n".join(line.rstrip() for line in aligned(lines))


@dataclass(frozen=True)
class Opponents:
    """What an agent is compared with; the same for every agent of an environment."""

    choice: RuleChoice
    constant: Sequence[PolicyRun]
    rule: PolicyRun


# --------------------------------------------------------------------------- command line


class AcceptanceTest:
    """Measures agents on the same items; what does not depend on the agent is measured once per environment."""

    def __init__(
        self,
        items: Sequence[Item],
        tuning: int,
        num_envs: int,
        seed: int,
        opponents: Path | None = None,
        price: float | None = None,
    ) -> None:
        self.items, self.tuning, self.num_envs, self.seed = list(items), tuning, num_envs, seed
        self.file, self.price = opponents, price
        self._known: dict[str, tuple[DiffusionDenoiseVectorEnv, Opponents]] = {}

    def measure(self, folder: Path, agent: Agent) -> AcceptanceReport:
        """Run the agent of ``folder`` against everything.

        Raises:
            FileNotFoundError, ValueError: as the environment and `read_opponents`.
        """
        price = agent.middle_price if self.price is None else agent.check_price(self.price)
        env, others = self._opponents(agent, price)
        choice, rule = others.choice, others.rule
        own = run_policy(env, agent, self.items, "agent", price)
        drawn = run_policy(env, RandomPolicy(own.shares, self.seed), self.items, "random", price)
        constant = [*others.constant, drawn]
        prompts = [item.prompt for item in self.items]
        found = conditions(own, constant, rule, prompts)
        dtype, policy_runs = env.backbone.dtype_name, [own, rule, *constant]
        return AcceptanceReport(str(folder), agent.fingerprint, dtype, choice, policy_runs, prompts, found, price)

    def _opponents(self, agent: Agent, price: float | None) -> tuple[DiffusionDenoiseVectorEnv, Opponents]:
        reward = agent.config.get("reward")  # as training left it: price and scales may have moved
        key = json.dumps([agent.environment, reward, price], sort_keys=True)
        if key not in self._known:
            env = make_agent_env(agent, self.num_envs, **({"reward": reward} if reward else {}))
            self._known[key] = env, self._measure_opponents(env, price)
        return self._known[key]

    def _measure_opponents(self, env: DiffusionDenoiseVectorEnv, price: float | None) -> Opponents:
        fingerprint = self._fingerprint(env) | ({} if price is None else {"price": price})
        if self.file and self.file.is_file():
            return read_opponents(self.file, fingerprint)
        choice = choose_rule(env, tuning_items(env, self.tuning, self.seed), price=price)
        rule = ThresholdRule(choice.look_at, choice.tau, env.config.num_inference_steps)
        played = run_policy(env, rule, self.items, rule.fingerprint, price)
        found = Opponents(choice, constants(env, self.items, price), played)
        if self.file:
            write_opponents(self.file, fingerprint, found)
        return found

    def _fingerprint(self, env: DiffusionDenoiseVectorEnv) -> dict[str, Any]:
        """What the opponents' returns depend on, the models' files included."""
        items = hashlib.sha256(repr(self.items).encode()).hexdigest()[:12]
        reward = dict(vars(env.reward_config))
        numbers = {"items": items, "tuning": self.tuning, "seed": self.seed, "taus": list(TAUS)}
        return {"models": baseline_configuration(env, 0), "env": settings_of(env), "reward": reward, **numbers}


def settings_of(env: DiffusionDenoiseVectorEnv) -> dict[str, Any]:
    """The environment's settings as JSON has them; of its prompts, which only serve tuning, their number."""
    return json.loads(json.dumps(asdict(env.config) | {"prompts": len(env.prompts)}, default=str))


def write_opponents(path: Path, fingerprint: dict[str, Any], found: Opponents) -> None:
    """Keep what the opponents made, as JSON."""
    policy_runs = [
        {"name": p.name, "episodes": [astuple(e) for e in p.episodes]} for p in (found.rule, *found.constant)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"stamp": fingerprint, "choice": asdict(found.choice), "plays": policy_runs}))


def read_opponents(path: Path, fingerprint: dict[str, Any]) -> Opponents:
    """What `write_opponents` kept.

    Raises:
        ValueError: no such file, or one made in another environment, on other prompts or with other models.
    """
    try:
        kept = json.loads(path.read_text())
        theirs, choice = kept["stamp"], RuleChoice(**kept["choice"])
        rule, *constant = (
            PolicyRun(p["name"], [Episode(v, s, n, tuple(a)) for v, s, n, a in p["episodes"]]) for p in kept["plays"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no opponents of the acceptance test ({error}); remove it") from error
    if differing := [name for name in fingerprint if fingerprint[name] != theirs.get(name)]:
        raise ValueError(f"{path} was made with other {', '.join(differing)}; remove it or name another file")
    return Opponents(choice, constant, rule)


def load_agent(folder: Path) -> Agent:
    """An agent that the acceptance test is for.

    Raises:
        FileNotFoundError, ValueError: as `Agent.from_pretrained`, or it acts elsewhere.
    """
    agent = Agent.from_pretrained(folder)
    environment, _ = agent.environment
    if not environment.startswith("AdDiffusion-Tiny-"):
        raise ValueError(
            f"{folder} acts on {environment!r}; the acceptance test is set in the embedded world, AdDiffusion-Tiny-v0"
        )
    return agent


def main(argv: Sequence[str] | None = None) -> int:
    """Decide; returns the exit status: 1 where an agent fails."""
    options = _parser().parse_args(argv)
    items = load_benchmark("tiny-dev", options.limit)
    test = AcceptanceTest(items, options.tuning, options.num_envs, options.seed, options.opponents, options.price)
    reports: list[AcceptanceReport] = []
    try:
        agents = [load_agent(folder) for folder in options.agents]  # all of them before the first is measured
        if options.price is not None:
            for agent in agents:
                agent.check_price(options.price)
        for folder, agent in zip(options.agents, agents, strict=True):
            reports.append(test.measure(folder, agent))
            if not options.json:
                print(f"{reports[-1].text()}\n", flush=True)
    finally:
        if options.json and reports:  # what was finished is told, whatever came then
            print(json.dumps([report.as_dict() for report in reports], indent=2))
    return 0 if all(report.passed for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="addiff acceptance", description="Decide whether agents pass the acceptance test."
    )
    parser.add_argument("agents", nargs="+", type=Path, metavar="AGENT", help="folder of an agent bundle")
    parser.add_argument(
        "--limit", type=at_least_one, default=None, help="pictures, categories in turn (default: all 1,024)"
    )
    parser.add_argument("--tuning", type=at_least_one, default=256, help="training prompts that the rule is chosen on")
    parser.add_argument("--num-envs", type=at_least_one, default=64, help="lanes denoised in one batch")
    parser.add_argument("--seed", type=int, default=0, help="of the training prompts and of the random policy")
    parser.add_argument("--opponents", type=Path, help="file that keeps what does not depend on the agent")
    parser.add_argument(
        "--price", type=float, help="of an evaluation, for agents with a price input (default: the middle of its range)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of tables")
    return parser
