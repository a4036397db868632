"""Methods that make pictures: policies on the environment, and solvers without anybody looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from addiff_env.agent import Agent
from addiff_env.diffusion.backbones import Prediction, denoise, to_uint8
from addiff_env.diffusion.samplers import SOLVERS, ddim_between
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Batched, Method
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions, solver_method
from addiff_env.evaluation.methods.rule_policies import Policy, RandomPolicy, RefineAlways, StopAt, ThresholdRule
from addiff_env.evaluation.metrics.registry import SCORERS, reward_score
from addiff_env.perception.scorers import load_scorer
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.types import Action, Generated, ResultRow

SEED_STRIDE = 1_000_003  # between an item's seeds in best-of-N; the first try has the item's own


class FixedSteps(Batched):
    """A solver with N steps, stated as ``ddim-N``: same model, guidance and noise as the environment ``env``."""

    def __init__(
        self, env: DiffusionDenoiseVectorEnv, steps: int, solver: str | None = None, batch_size: int | None = None
    ) -> None:
        solver = solver or env.backbone.solver
        super().__init__(env, f"{solver}-{steps}", batch_size)
        self.steps = steps
        self.expected_nfe = float(steps)
        self.schedule = env.backbone.schedule(steps, env.latent_shape, solver)

    def latents(self, prompts: list[str], seeds: Sequence[int], watch: Any = None) -> torch.Tensor:
        """Final latents (B, C, h, w)."""
        noise, scale = self._noise(seeds), self.env.config.guidance_scale
        negative = self.env.config.negative_prompt
        return denoise(self.env.backbone, self.schedule, prompts, noise, scale, watch, negative_prompt=negative)

    def _batch(self, items: list[Item]) -> list[Generated]:
        latents = self.latents([item.prompt for item in items], [item.seed for item in items])
        pictures = to_uint8(self.env.backbone.decode(latents))
        passes = self.steps * self.env.passes_per_nfe
        return [self._generated(item, picture, passes) for item, picture in zip(items, pictures, strict=True)]


class WordCount(Batched):
    """As many steps as the prompt's length asks for, at a mean of ``mean_steps``: adaptive, but blind.

    ``benchmark`` holds all items of the list, whose mean length sets the scale: a shard, what an interruption left
    over, or a run with a limit gets the steps that it gets in the whole.
    """

    def __init__(
        self,
        env: DiffusionDenoiseVectorEnv,
        mean_steps: float,
        benchmark: Sequence[Item],
        batch_size: int | None = None,
    ) -> None:
        super().__init__(env, f"words-{mean_steps:g}", batch_size)
        if not benchmark or not mean_steps >= 1:
            raise ValueError(f"{self.name} needs at least one step and one prompt, got {len(benchmark)}")
        self.expected_nfe = mean_steps
        self.mean_steps, self.mean_words = mean_steps, float(np.mean([_words(item) for item in benchmark]))
        self.policy = f"{self.name} at {self.mean_words:.6g} words"

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""
        lengths = np.array([_words(item) for item in items])
        steps = np.maximum(1, np.rint(self.mean_steps * lengths / self.mean_words)).astype(int)
        for number in sorted(set(steps.tolist())):
            chosen = [item for item, own in zip(items, steps, strict=True) if own == number]
            yield from FixedSteps(self.env, number, batch_size=self.batch_size).make(chosen)


def _words(item: Item) -> int:
    return max(1, len(item.prompt.split()))


class BestOf(Batched):
    """The best of ``number`` seeds by the environment's reward model: the plain way to spend compute on quality.

    It pays for ``number`` whole pictures and as many verdicts of the reward model; no encoder is asked.
    """

    def __init__(self, inner: FixedSteps, number: int) -> None:
        if number < 1:
            raise ValueError(f"the best of {number} pictures is none")
        super().__init__(inner.env, f"best-of-{number}:{inner.name}", max(1, inner.batch_size // number))
        self.inner, self.number, self.solver = inner, number, inner.name
        self.expected_nfe = number * inner.expected_nfe

    def _batch(self, items: list[Item]) -> list[Generated]:
        prompts = [item.prompt for item in items for _ in range(self.number)]
        seeds = [item.seed + SEED_STRIDE * k for item in items for k in range(self.number)]
        size = self.inner.batch_size  # of one picture's tries there may be more
        starts = range(0, len(prompts), size)
        latents = [self.inner.latents(prompts[at : at + size], seeds[at : at + size]) for at in starts]
        pictures = self.env.backbone.decode(torch.cat(latents))
        scores = reward_score(self.env.perception)(pictures, prompts).view(len(items), self.number)
        best = scores.argmax(1).tolist()
        images = to_uint8(pictures)
        passes = self.number * self.inner.steps * self.env.passes_per_nfe
        return [
            self._generated(item, images[row * self.number + best[row]], passes, self.number, self.number)
            for row, item in enumerate(items)
        ]


class OracleStop(Batched):
    """The stopping step that, in hindsight, a scorer likes best; its looks are not charged: it is a bound.

    A stop is what an agent's is: the clean prediction, or ``finish_steps`` coarse steps from there, which are charged.

    Args:
        inner: the solver and its steps.
        scorer: one of the metrics' scorers (``imagereward``, ``hpsv2.1``, ...) or a setting of
            `addiff_env.perception.scorers.load_scorer`; None: the environment's reward model.

    Raises:
        FileNotFoundError, ValueError: as `load_scorer`.
    """

    def __init__(self, inner: FixedSteps, scorer: str | None = None) -> None:
        super().__init__(inner.env, f"oracle-stop:{inner.name}" + (f"@{scorer}" if scorer else ""), inner.batch_size)
        self.inner, self.solver, self.expected_nfe = inner, inner.name, inner.expected_nfe
        self.score = _scorer(inner.env, scorer)

    def _batch(self, items: list[Item]) -> list[Generated]:
        prompts = [item.prompt for item in items]
        finish = self.env.config.finish_steps
        stops: list[tuple[int, np.ndarray]] = []  # NFE and pictures of each
        scores: list[torch.Tensor] = []

        def stop(nfe: int, latents: torch.Tensor) -> None:
            pictures = self.env.backbone.decode(latents)
            stops.append((nfe, to_uint8(pictures)))
            scores.append(self.score(pictures, prompts))

        def watch(index: int, latents: torch.Tensor, now: Prediction) -> None:
            if not finish:
                stop(index + 1, now.x0)
            elif index:
                stop(index + finish, self._finished(prompts, latents, index))

        last = self.inner.latents(prompts, [item.seed for item in items], watch)
        if finish:
            stop(self.inner.steps, last)
        best = torch.stack(scores, 1).argmax(1).tolist()
        passes = self.env.passes_per_nfe
        return [
            self._generated(item, stops[choice][1][row], stops[choice][0] * passes)
            for row, (item, choice) in enumerate(zip(items, best, strict=True))
        ]

    def _finished(self, prompts: list[str], latents: torch.Tensor, index: int) -> torch.Tensor:
        """What the environment's *stop* makes of latents (B, C, h, w) at a point of the grid: its coarse DDIM steps."""
        env, schedule, steps = self.env, self.inner.schedule, self.env.config.finish_steps
        at = torch.full((len(latents),), index, device=latents.device)
        conditioning = env.backbone.encode_prompts(prompts, env.config.negative_prompt)
        path = env.denoiser.coarse_path(schedule.timesteps[at], schedule.current.at(at), steps)
        for timesteps, current, next_level in path:
            now = env.backbone.predict(latents, timesteps, current, conditioning, env.config.guidance_scale, False)
            latents = ddim_between(latents, now.x0, current, next_level)
        return latents


def _scorer(env: DiffusionDenoiseVectorEnv, setting: str | None) -> Callable[[torch.Tensor, list[str]], torch.Tensor]:
    if setting is None:
        return reward_score(env.perception)
    name, colon, rest = setting.partition(":")
    return load_scorer(SCORERS.get(name, name) + colon + rest, str(env.backbone.device)).score


class PolicyMethod:
    """A policy on its environment: a trained agent, or a hand-made rule, which pays for the looks that it reads."""

    def __init__(self, env: DiffusionDenoiseVectorEnv, policy: Policy, name: str = "agent") -> None:
        self.pipeline, self.name, self.backbone = AdaptivePipeline(env, policy), name, env.backbone
        self.solver = f"{env.config.solver}-{env.config.num_inference_steps}"
        self.policy = policy.fingerprint
        self.expected_nfe = float(env.config.num_inference_steps)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Run the policy on every item."""
        for group in self.pipeline.stream([item.prompt for item in items], [item.seed for item in items]):
            yield [(items[index], made) for index, made in group]


# --------------------------------------------------------------------------- controls of H4

Scripts = Mapping[tuple[str, int], ResultRow]  # an agent's rows by (prompt, seed)


class Replay(Batched):
    """An agent's recorded decisions on an environment that differs in one setting, so that NFE are the same.

    Args:
        env: lanes that wait when they have ended (autoreset DISABLED).
        name: e.g. ``agent, mask=full``.
        scripts: the agent's rows by (prompt, seed).

    Raises:
        ValueError: an item that the agent has no row for.
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, name: str, scripts: Scripts) -> None:
        super().__init__(env, name, env.num_envs)
        self.scripts, self.expected_nfe = scripts, _mean_nfe(scripts)

    def _batch(self, items: list[Item]) -> list[Generated]:
        env, scripts = self.env, [_script(self.scripts, item).actions for item in items]
        mask = np.arange(env.num_envs) < len(items)
        options = {"prompt": [item.prompt for item in items], "seed": [item.seed for item in items]}
        env.reset(options=options | {"reset_mask": mask})
        env.park(~mask)  # lanes without an item wait
        for t in range(max(1, *map(len, scripts))):  # one step even of lanes that broke down in their warm-up
            running = ~env.done
            if not running.any():
                break
            actions = [script[t] if t < len(script) else int(Action.STOP) for script in scripts]
            info = env.step(np.array(actions + [int(Action.STOP)] * (env.num_envs - len(items))))[-1]
        return [
            Generated(
                item.prompt,
                item.seed,
                env.final_image(lane),
                list(scripts[lane]),
                int(info["nfe"][lane]),
                int(info["forward_passes"][lane]),
                float(info["net_flops"][lane]),
            )
            for lane, item in enumerate(items)
        ]


class MatchedSteps(Batched):
    """Fixed steps, per picture as many as the agent spent on it: what continuing would have made of the same NFE."""

    def __init__(
        self, env: DiffusionDenoiseVectorEnv, name: str, scripts: Scripts, batch_size: int | None = None
    ) -> None:
        super().__init__(env, name, batch_size)
        self.scripts, self.expected_nfe = scripts, _mean_nfe(scripts)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """Make one picture per item."""
        spent = [_script(self.scripts, item).nfe for item in items]
        for number in sorted(set(spent)):
            chosen = [item for item, own in zip(items, spent, strict=True) if own == number]
            yield from FixedSteps(self.env, number, batch_size=self.batch_size).make(chosen)


def _mean_nfe(scripts: Scripts) -> float:
    return float(np.mean([row.nfe for row in scripts.values()])) if scripts else 0.0


def _script(scripts: Scripts, item: Item) -> ResultRow:
    row = scripts.get((item.prompt, item.seed))
    if row is None:
        raise ValueError(f"the agent has no row for {item.prompt!r}, seed {item.seed}: run it on the same items first")
    return row


# --------------------------------------------------------------------------- methods by name

METHODS = (
    "agent, ddim-N, dpmpp_2m-N, euler-N, unipc-N, pndm-N, sag-N, attend-and-excite-N, lcm-N, sdxl-turbo-N, "
    "best-of-K:<solver>-N, oracle-stop:<solver>-N, oracle-stop:<solver>-N@<scorer>, "
    "words-N, stop-N, refine-always, threshold:<steps>:<score>, random:<continue>:<stop>:<refine>; "
    "and tuned to the agent on other prompts: threshold:auto, random:auto, words-auto, best-of-auto"
)


def make_method(
    spec: str,
    env: DiffusionDenoiseVectorEnv,
    agent: Agent | None = None,
    options: MethodOptions = MethodOptions(),  # noqa: B008 (frozen)
    benchmark: Sequence[Item] = (),
) -> Method:
    """The method that ``spec`` names (`METHODS`), on the model and settings of ``env``.

    ``benchmark`` holds all items of the list, also those of other shards and beyond the limit.

    Raises:
        ValueError: unknown, or its numbers do not parse; the message quotes it.
        FileNotFoundError, ImportError: weights or a package that it needs are missing; says what to get.
    """
    head, _, tail = spec.partition(":")
    try:
        if spec == "agent" and agent is not None:
            return PolicyMethod(env, agent)
        if head.startswith("best-of-"):
            return BestOf(_fixed(tail, env), int(head.removeprefix("best-of-")))
        if head == "oracle-stop":
            inner, _, scorer = tail.partition("@")
            return OracleStop(_fixed(inner, env), scorer or None)
        if policy := _policy(head, tail, env):
            return PolicyMethod(env, policy, spec)
        name, _, number = spec.rpartition("-")
        if name == "words":
            return WordCount(env, float(number), benchmark)
        return _solver(name, int(number), env, options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot make the method {spec!r}: {error}; known: {METHODS}") from error


def _policy(head: str, tail: str, env: DiffusionDenoiseVectorEnv) -> Policy | None:
    steps = env.config.num_inference_steps
    if head == "threshold":
        look_at, tau = tail.split(":")
        return ThresholdRule(int(look_at), float(tau), steps)
    if head == "random":
        return RandomPolicy([float(share) for share in tail.split(":")])
    if head == "refine-always":
        return RefineAlways()
    if head.startswith("stop-"):
        return StopAt(int(head.removeprefix("stop-")), steps)
    return None


def _fixed(spec: str, env: DiffusionDenoiseVectorEnv) -> FixedSteps:
    name, _, number = spec.rpartition("-")
    return FixedSteps(env, int(number), name)


def _solver(name: str, steps: int, env: DiffusionDenoiseVectorEnv, options: MethodOptions) -> Method:
    if name in SOLVERS and (name != "euler" or env.backbone.solver == "euler"):
        return FixedSteps(env, steps, name)
    method = solver_method(name, steps, env, options)
    if method is None:
        raise ValueError(f"unknown solver {name!r}")
    return method
