"""The learning bar: does an agent use what it may do, and does it beat what one can do by hand?

    addiff acceptance runs/train/tiny-seed0/agent
    addiff acceptance runs/train/tiny-seed{0,1,2}/agent --limit 256 --json > bar.json
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
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from addiff_env.agent import Agent
from addiff_env.env.baseline_cache import baseline_configuration
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.methods.registry import PolicyMethod
from addiff_env.evaluation.methods.rule_policies import (
    Policy,
    RandomPolicy,
    RefineAlways,
    StopAt,
    ThresholdRule,
    quality_slot,
    steps_done,
)
from addiff_env.evaluation.statistics.significance import Interval, interval, resampled_means
from addiff_env.pipeline import make_agent_env
from addiff_env.stats import at_least_one
from addiff_env.storage.files import write_whole
from addiff_env.tiny.checker import judge
from addiff_env.types import ACTIONS, Action

LEAST_SHARE = 0.03  # of each action among all decisions
LEAST_SPREAD = 2.0  # standard deviation of NFE over pictures
TAUS = tuple(np.arange(-3.0, 4.25, 0.25).tolist())  # reward-model scores; a logit of 4 is a success at 98%


@dataclass(frozen=True)
class Episode:
    """What a policy made of one item."""

    value: float  # return: all rewards, summed
    success: float  # 0 or 1, by the exact checker
    nfe: int
    actions: tuple[int, ...]  # as carried out


@dataclass(frozen=True)
class Ending:
    """How an episode ends if it is stopped at a look; ``score`` is what the policy sees there."""

    score: float  # the reward model's; infinite at the end that leaves nothing to decide
    episode: Episode


@dataclass(frozen=True)
class Play:
    """One policy's episodes, in the items' order."""

    name: str
    episodes: Sequence[Episode]

    @cached_property
    def values(self) -> np.ndarray:
        """Returns (N,)."""
        return np.array([episode.value for episode in self.episodes])

    @property
    def success(self) -> float:
        """Share of pictures that the checker accepts."""
        return float(np.mean([episode.success for episode in self.episodes]))

    @property
    def nfe(self) -> np.ndarray:
        """Denoiser evaluations (N,)."""
        return np.array([episode.nfe for episode in self.episodes])

    @property
    def shares(self) -> np.ndarray:
        """Shares (3,) of continue, stop and refine among all decisions."""
        taken = np.concatenate([episode.actions for episode in self.episodes])
        return np.bincount(taken, minlength=len(ACTIONS)) / len(taken)


# --------------------------------------------------------------------------- playing


def play(env: DiffusionDenoiseVectorEnv, policy: Policy, items: Sequence[Item], name: str) -> Play:
    """Run ``policy`` once on every item."""
    method, episodes = PolicyMethod(env, policy, name), {}
    for group in _counted(method.make(list(items)), len(items), name):
        for item, made in group:
            success = float(judge(made.picture, item.prompt).satisfied)
            episodes[item] = Episode(made.reward, success, made.nfe, tuple(made.actions))
    return Play(name, [episodes[item] for item in items])


def endings(
    env: DiffusionDenoiseVectorEnv, walk: Policy, look_at: int, items: Sequence[Item], name: str
) -> list[list[Ending]]:
    """Follow ``walk``, and from ``look_at`` steps on see at every decision how stopping there would end.

    One walk that always continues tells what stopping after k steps is worth for every k; one that refines while the
    score is under tau tells it for every smaller tau too. The last ending of each item is the walk's own.
    """
    size = env.num_envs
    batches = (_endings(env, walk, look_at, items[at : at + size]) for at in range(0, len(items), size))
    return [found for batch in _counted(batches, len(items), name) for found in batch]


def _endings(env: DiffusionDenoiseVectorEnv, walk: Policy, look_at: int, items: Sequence[Item]) -> list[list[Ending]]:
    walks = [_Walk(item) for item in items]
    mask = np.arange(env.num_envs) < len(items)
    options = {"prompt": [item.prompt for item in items], "seed": [item.seed for item in items]}
    observation, info = env.reset(options=options | {"reset_mask": mask})
    env.done[~mask] = True  # lanes without an item wait
    while (running := ~env.done).any():
        actions = walk.act(observation, info["action_mask"])
        seen = quality_slot(observation, "reward_score")
        looking = running & (steps_done(observation, env.config.num_inference_steps) >= look_at)
        could_stop = info["action_mask"][:, Action.STOP].astype(bool) & (actions != Action.STOP)
        _try_stops(env, walks, np.flatnonzero(looking & could_stop), seen)
        observation, reward, _, _, info = env.step(actions)
        for lane in np.flatnonzero(running).tolist():
            walks[lane].step(lane, reward, info)
            if env.done[lane]:
                walks[lane].note(math.inf, env, lane)
    return [walk.found for walk in walks]


def _try_stops(env: DiffusionDenoiseVectorEnv, walks: list[_Walk], lanes: np.ndarray, seen: np.ndarray) -> None:
    """Note how stopping ``lanes`` now would end, and put everything back."""
    if len(lanes) == 0:
        return
    state = env.state_dict()
    env.done[np.setdiff1d(np.arange(env.num_envs), lanes)] = True  # the others wait
    _, reward, _, _, info = env.step(np.full(env.num_envs, int(Action.STOP)))
    for lane in lanes.tolist():
        walks[lane].branch(lane, reward, info).note(float(seen[lane]), env, lane)
    env.load_state_dict(state)


class _Walk:
    """One item's way so far, and the endings found along it."""

    def __init__(self, item: Item, value: float = 0.0, actions: Sequence[int] = ()) -> None:
        self.item, self.value, self.actions = item, value, list(actions)
        self.found: list[Ending] = []

    def step(self, lane: int, reward: np.ndarray, info: dict[str, Any]) -> None:
        self.value += float(reward[lane])
        if info["action_taken"][lane] >= 0:  # else it broke down in its warm-up
            self.actions.append(int(info["action_taken"][lane]))

    def branch(self, lane: int, reward: np.ndarray, info: dict[str, Any]) -> _Walk:
        """This way with another last step; what is found there is kept here."""
        other = _Walk(self.item, self.value, self.actions)
        other.found = self.found
        other.step(lane, reward, info)
        return other

    def note(self, score: float, env: DiffusionDenoiseVectorEnv, lane: int) -> None:
        """The lane has ended."""
        success = float(judge(env.final_image(lane), self.item.prompt).satisfied)
        episode = Episode(self.value, success, int(env.nfe[lane]), tuple(self.actions))
        self.found.append(Ending(score, episode))


def _counted(groups: Iterable[list[Any]], total: int, name: str) -> Iterator[list[Any]]:
    with tqdm(total=total, desc=name, unit="image", file=sys.stderr, leave=False) as bar:
        for group in groups:
            bar.update(len(group))
            yield group


# --------------------------------------------------------------------------- the opponents


@dataclass(frozen=True)
class Choice:
    """The threshold rule with the highest mean return on training prompts."""

    look_at: int
    tau: float
    value: float  # that return
    prompts: int  # how many it is the mean of
    rules: int  # how many were compared


def choose_rule(env: DiffusionDenoiseVectorEnv, items: Sequence[Item], taus: Sequence[float] = TAUS) -> Choice:
    """Try every n and every tau on ``items``; of equal ones the first counts."""
    steps, first = env.config.num_inference_steps, max(1, env.config.warmup_steps)
    table: dict[tuple[int, float], float] = {}
    for look_at in range(first, steps):
        walk = ThresholdRule(look_at, max(taus), steps)
        found = endings(env, walk, look_at, items, f"looking after {look_at} steps")
        table |= {(look_at, tau): float(np.mean([_stopped(own, tau).value for own in found])) for tau in taus}
    (look_at, tau), value = max(table.items(), key=lambda entry: entry[1])
    return Choice(look_at, tau, value, len(items), len(table))


def _stopped(found: Sequence[Ending], tau: float) -> Episode:
    """The episode of a rule that stops at the first score of at least ``tau``."""
    return next(ending.episode for ending in found if ending.score >= tau)


def constants(env: DiffusionDenoiseVectorEnv, items: Sequence[Item]) -> list[Play]:
    """Stop after k steps for every k, always continue, refine always."""
    steps = env.config.num_inference_steps
    found = endings(env, StopAt(steps, steps), 0, items, "stop-k")
    numbers = range(max(1, env.config.warmup_steps), steps)
    stops = [Play(f"stop-{k}", [_after(own, k - numbers.start) for own in found]) for k in numbers]
    continued = Play("always-continue", [own[-1].episode for own in found])
    return [*stops, continued, play(env, RefineAlways(), items, "refine-always")]


def _after(found: Sequence[Ending], decisions: int) -> Episode:
    """Stopped after so many decisions; a lane that ended before (its numbers were not finite) keeps its own end."""
    return found[min(decisions, len(found) - 1)].episode


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


def conditions(agent: Play, constant: Sequence[Play], rule: Play, prompts: Sequence[str]) -> list[Condition]:
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
    above = Condition(f"return above every constant, nearest {name}", "> 0", _words(nearest), ahead)
    best = difference(agent.values, rule.values, prompts)
    not_below = Condition(f"return not below {rule.name}", ">= 0", _words(best), best.estimate >= 0)
    return [*used, varies, above, not_below]


def _words(number: Interval) -> str:
    return _with_ends(number.estimate, *_ends(number))


def _ends(number: Interval) -> tuple[float | None, float | None]:
    return (None, None) if math.isnan(number.low) else (number.low, number.high)


def _with_ends(estimate: float, low: float | None, high: float | None) -> str:
    return f"{estimate:+.4f} " + ("[n/a: one prompt]" if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]")


@dataclass(frozen=True)
class Report:
    """Everything that was found out about one agent."""

    agent: str
    fingerprint: str
    dtype: str
    rule: Choice
    plays: Sequence[Play]  # the agent's first
    prompts: Sequence[str]
    conditions: Sequence[Condition]

    @property
    def passed(self) -> bool:
        """Whether every condition is known to be met."""
        return all(condition.passed for condition in self.conditions)

    def rows(self) -> list[dict[str, Any]]:
        """One row of numbers per policy."""
        return [self._row(play) for play in self.plays]

    def _row(self, play: Play) -> dict[str, Any]:
        ahead = difference(self.plays[0].values, play.values, self.prompts)
        return {
            "policy": play.name,
            "return": float(play.values.mean()),
            "agent_ahead": [ahead.estimate, *_ends(ahead)],
            "success": play.success,
            "nfe_mean": float(play.nfe.mean()),
            "nfe_std": float(play.nfe.std()),
            "shares": dict(zip(ACTIONS, play.shares.tolist(), strict=True)),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        numbers = {"pictures": len(self.prompts), "rows": self.rows(), "passed": self.passed}
        head = {"agent": self.agent, "fingerprint": self.fingerprint, "dtype": self.dtype, "rule": asdict(self.rule)}
        return head | numbers | {"conditions": [asdict(condition) for condition in self.conditions]}

    def text(self) -> str:
        """The table and the verdicts."""
        rule = self.rule
        head = f"{self.agent} ({self.fingerprint}), {len(self.prompts)} pictures of tiny-dev, {self.dtype}"
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        [cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)


@dataclass(frozen=True)
class Opponents:
    """What an agent is compared with; the same for every agent of an environment."""

    choice: Choice
    constant: Sequence[Play]
    rule: Play


# --------------------------------------------------------------------------- command line


class Bar:
    """Measures agents on the same items; what does not depend on the agent is measured once per environment."""

    def __init__(
        self, items: Sequence[Item], tuning: int, num_envs: int, seed: int, opponents: Path | None = None
    ) -> None:
        self.items, self.tuning, self.num_envs, self.seed = list(items), tuning, num_envs, seed
        self.file = opponents
        self._known: dict[str, tuple[DiffusionDenoiseVectorEnv, Opponents]] = {}

    def measure(self, folder: Path, agent: Agent) -> Report:
        """Run the agent of ``folder`` against everything.

        Raises:
            FileNotFoundError, ValueError: as the environment and `read_opponents`.
        """
        env, others = self._opponents(agent)
        choice, rule = others.choice, others.rule
        own = play(env, agent, self.items, "agent")
        constant = [*others.constant, play(env, RandomPolicy(own.shares, self.seed), self.items, "random")]
        prompts = [item.prompt for item in self.items]
        found = conditions(own, constant, rule, prompts)
        dtype, plays = env.backbone.dtype_name, [own, rule, *constant]
        return Report(str(folder), agent.fingerprint, dtype, choice, plays, prompts, found)

    def _opponents(self, agent: Agent) -> tuple[DiffusionDenoiseVectorEnv, Opponents]:
        reward = agent.config.get("reward")  # as training left it: price and scales may have moved
        key = json.dumps([agent.environment, reward], sort_keys=True)
        if key not in self._known:
            env = make_agent_env(agent, self.num_envs, **({"reward": reward} if reward else {}))
            self._known[key] = env, self._play_opponents(env)
        return self._known[key]

    def _play_opponents(self, env: DiffusionDenoiseVectorEnv) -> Opponents:
        stamp = self._stamp(env)
        if self.file and self.file.is_file():
            return read_opponents(self.file, stamp)
        choice = choose_rule(env, tuning_items(env, self.tuning, self.seed))
        rule = ThresholdRule(choice.look_at, choice.tau, env.config.num_inference_steps)
        found = Opponents(choice, constants(env, self.items), play(env, rule, self.items, rule.fingerprint))
        if self.file:
            write_opponents(self.file, stamp, found)
        return found

    def _stamp(self, env: DiffusionDenoiseVectorEnv) -> dict[str, Any]:
        """What the opponents' returns depend on, the models' files included."""
        items = hashlib.sha256(repr(self.items).encode()).hexdigest()[:12]
        reward = dict(vars(env.reward_config))
        numbers = {"items": items, "tuning": self.tuning, "seed": self.seed, "taus": list(TAUS)}
        return {"models": baseline_configuration(env, 0), "env": settings_of(env), "reward": reward, **numbers}


def settings_of(env: DiffusionDenoiseVectorEnv) -> dict[str, Any]:
    """The environment's settings as JSON has them; of its prompts, which only serve tuning, their number."""
    return json.loads(json.dumps(asdict(env.config) | {"prompts": len(env.prompts)}, default=str))


def write_opponents(path: Path, stamp: dict[str, Any], found: Opponents) -> None:
    """Keep what the opponents made, as JSON."""
    plays = [{"name": p.name, "episodes": [astuple(e) for e in p.episodes]} for p in (found.rule, *found.constant)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"stamp": stamp, "choice": asdict(found.choice), "plays": plays}))


def read_opponents(path: Path, stamp: dict[str, Any]) -> Opponents:
    """What `write_opponents` kept.

    Raises:
        ValueError: no such file, or one made in another environment, on other prompts or with other models.
    """
    try:
        kept = json.loads(path.read_text())
        theirs, choice = kept["stamp"], Choice(**kept["choice"])
        rule, *constant = (
            Play(p["name"], [Episode(v, s, n, tuple(a)) for v, s, n, a in p["episodes"]]) for p in kept["plays"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no opponents of the bar ({error}); remove it") from error
    if differing := [name for name in stamp if stamp[name] != theirs.get(name)]:
        raise ValueError(f"{path} was made with other {', '.join(differing)}; remove it or name another file")
    return Opponents(choice, constant, rule)


def load_agent(folder: Path) -> Agent:
    """An agent that the bar is set for.

    Raises:
        FileNotFoundError, ValueError: as `Agent.from_pretrained`, or it acts elsewhere.
    """
    agent = Agent.from_pretrained(folder)
    environment, _ = agent.environment
    if not environment.startswith("AdDiffusion-Tiny-"):
        raise ValueError(f"{folder} acts on {environment!r}; the bar is set in the embedded world, AdDiffusion-Tiny-v0")
    return agent


def main(argv: Sequence[str] | None = None) -> int:
    """Decide; returns the exit status: 1 where an agent misses the bar."""
    options = _parser().parse_args(argv)
    items = load_benchmark("tiny-dev", options.limit)
    bar = Bar(items, options.tuning, options.num_envs, options.seed, options.opponents)
    reports: list[Report] = []
    try:
        agents = [load_agent(folder) for folder in options.agents]  # all of them before the first is measured
        for folder, agent in zip(options.agents, agents, strict=True):
            reports.append(bar.measure(folder, agent))
            if not options.json:
                print(f"{reports[-1].text()}\n", flush=True)
    finally:
        if options.json and reports:  # what was finished is told, whatever came then
            print(json.dumps([report.as_dict() for report in reports], indent=2))
    return 0 if all(report.passed for report in reports) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="addiff acceptance", description="Decide the learning bar.")
    parser.add_argument("agents", nargs="+", type=Path, metavar="AGENT", help="folder of an agent bundle")
    parser.add_argument(
        "--limit", type=at_least_one, default=None, help="pictures, categories in turn (default: all 1,024)"
    )
    parser.add_argument("--tuning", type=at_least_one, default=256, help="training prompts that the rule is chosen on")
    parser.add_argument("--num-envs", type=at_least_one, default=64, help="lanes denoised in one batch")
    parser.add_argument("--seed", type=int, default=0, help="of the training prompts and of the random policy")
    parser.add_argument("--opponents", type=Path, help="file that keeps what does not depend on the agent")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of tables")
    return parser
