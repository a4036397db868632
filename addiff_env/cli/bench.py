"""Measure the pipeline's speed: every figure a ratio to a baseline of the same process, in turns with it.

    addiff bench                                     the embedded world, all comparisons
    addiff bench env=sd15 device=cuda dtype=bfloat16 --only diffusers batching --json bench.json
    addiff bench num_envs=4 --rounds 3 --prompts 32

A round times each side once, in alternating order; shown are the median of the rounds' ratios and their extremes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from addiff_env.agent import Agent, PolicyNet
from addiff_env.cli.chosen import Chosen, add_settings, read_chosen
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.loading.isolation import isolated
from addiff_env.pipeline import SHIPPED_AGENT, LaneScheduler, Request
from addiff_env.storage.files import write_whole
from addiff_env.types import Generated

TEXTS = ("a red circle left of a blue star", "two green squares", "a large yellow ring", "a pink cross above a star")
# Settings of an environment in which nobody looks before the end.
BLIND: dict[str, Any] = {
    "reads": [],
    "observe_every": 1_000_000,
    "reward": {"clip_weight": 0.0, "reward_weight": 0.0, "instability": 0.0},
}


@dataclass(frozen=True)
class Side:
    """One of those that are timed in turns."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None  # not timed


@dataclass(frozen=True)
class Figure:
    """A ratio, its median over the rounds and its extremes."""

    comparison: str
    name: str
    rounds: list[float]
    median: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        for name, of in (("median", statistics.median), ("low", min), ("high", max)):
            object.__setattr__(self, name, float(of(self.rounds)))


def in_turns(sides: dict[str, Side], rounds: int, device: torch.device) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of each side, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sorted(sides, reverse=bool(number % 2)):
            sides[name].prepare()
            _wait(device)
            began = time.perf_counter()
            sides[name].run()
            _wait(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """The comparisons for one environment's settings."""

    def __init__(self, chosen: Chosen, rounds: int, prompts: int) -> None:
        self.chosen, self.rounds, self.prompts = chosen, rounds, prompts
        self.seconds: dict[str, dict[str, list[float]]] = {}  # by comparison and side
        self._calls = count()

    def env(self, num_envs: int | None = None, **more: Any) -> DiffusionDenoiseVectorEnv:
        """The chosen environment with lanes that wait."""
        settings: dict[str, Any] = {"num_envs": num_envs or self.lanes, "autoreset_mode": AutoresetMode.DISABLED}
        made = gym.make_vec(self.chosen.env_id, **settings | self.chosen.overrides | more).unwrapped
        assert isinstance(made, DiffusionDenoiseVectorEnv)
        return made

    @property
    def lanes(self) -> int:
        """Lanes of a batch."""
        return self.chosen.num_envs

    @cached_property
    def looking(self) -> DiffusionDenoiseVectorEnv:
        """With everything that its policy sees."""
        return self.env()

    @cached_property
    def blind(self) -> DiffusionDenoiseVectorEnv:
        """In which nobody looks."""
        return self.env(**BLIND)

    @cached_property
    def agent(self) -> Any:
        """The shipped agent where it fits; else one with random weights, which decides as fast."""
        shipped = Agent.from_pretrained(SHIPPED_AGENT)
        if list(shipped.policy.norm.parts.items()) == list(self.looking.parts.items()):
            return shipped
        return Agent(PolicyNet(self.looking.parts), {"observation": self.looking.parts})

    def texts(self, number: int) -> list[str]:
        """Prompts that no cache knows, each with the same words as always."""
        return [TEXTS[k % len(TEXTS)] + " " * next(self._calls) for k in range(number)]

    def requests(self) -> list[Request]:
        """As many as are to be made."""
        return [Request(k, text, k) for k, text in enumerate(self.texts(self.prompts))]

    def continues(self, env: DiffusionDenoiseVectorEnv) -> None:
        """The whole schedule without decisions."""
        env.reset(options={"prompt": self.texts(env.num_envs), "seed": list(range(env.num_envs))})
        while not env.done.all():
            env.step(np.zeros(env.num_envs, np.int64))

    def timed(self, comparison: str, sides: dict[str, Side]) -> dict[str, np.ndarray]:
        """`in_turns`, and kept."""
        found = in_turns(sides, self.rounds, self.looking.backbone.device)
        self.seconds[comparison] = {name: values.tolist() for name, values in found.items()}
        return found

    def against(self, comparison: str, sides: dict[str, Side], baseline: str) -> list[Figure]:
        """How long each side takes, as multiples of the baseline."""
        found = self.timed(comparison, sides)
        others = [name for name in found if name != baseline]
        return [Figure(comparison, f"{name} / {baseline}", (found[name] / found[baseline]).tolist()) for name in others]

    # ----------------------------------------------------------------- comparisons

    def diffusers(self) -> list[Figure]:
        """All lanes continue, without and with looks, against diffusers' own pipeline on the same networks."""
        from diffusers import DDIMScheduler

        from addiff_env.evaluation.methods.diffusers_methods import make_pipeline

        config = self.looking.config
        pipeline = make_pipeline(self.looking.backbone, DDIMScheduler, None, "addiff bench")

        @isolated()
        def theirs() -> None:
            pipeline(
                self.texts(self.lanes),
                height=config.height,
                width=config.width,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in range(self.lanes)],
                output_type="np",
            )

        ours = {"without looks": self.blind, "with looks": self.looking}
        sides = {name: Side(partial(self.continues, env)) for name, env in ours.items()}
        return self.against("diffusers", sides | {"diffusers": Side(theirs)}, "diffusers")

    def mixed(self) -> list[Figure]:
        """Steps of lanes at mixed points of the schedule, against lanes in step."""
        steps = self.lanes + 4
        env = self.env(**BLIND | {"num_inference_steps": 2 * steps, "warmup_steps": 0, "max_nfe": None})
        ready = np.zeros(env.num_envs, np.int64)

        def start(apart: bool) -> None:
            for lane in range(env.num_envs):
                mask = np.arange(env.num_envs) == lane
                env.reset(options={"prompt": self.texts(1), "seed": [lane], "reset_mask": mask})
                if apart:
                    env.step(ready)
            env.step(ready)

        def run() -> None:
            for _ in range(3):
                env.step(ready)

        def prepare(apart: bool) -> Callable[[], None]:
            def put() -> None:
                env.park(np.arange(env.num_envs))
                start(apart)

            return put

        sides = {"mixed": Side(run, prepare(True)), "in step": Side(run, prepare(False))}
        return self.against("mixed", sides, "in step")

    def batched(self) -> list[Figure]:
        """Steps of as many lanes in single environments, against one vector environment."""
        from stable_baselines3.common.vec_env import DummyVecEnv

        def one() -> gym.Env[Any, Any]:
            return gym.make(self.chosen.env_id, **self.chosen.overrides)

        makers, zeros = [one] * self.lanes, np.zeros(self.lanes, np.int64)
        dummy, sync = DummyVecEnv(makers), SyncVectorEnv(makers)

        def steps(env: Any) -> Callable[[], None]:
            def twice() -> None:
                for _ in range(2):
                    env.step(zeros)

            return twice

        sides = {
            "DummyVecEnv": Side(steps(dummy), dummy.reset),
            "SyncVectorEnv": Side(steps(sync), sync.reset),
            "vector": Side(steps(self.looking), lambda: self.looking.reset(seed=0)),
        }
        found = self.against("batched", sides, "vector")
        dummy.close()
        sync.close()
        return found

    def batching(self) -> list[Figure]:
        """Lanes that refill at once against batches that end together, and against full batches of such steps."""
        made: dict[str, list[Generated]] = {}

        def play(name: str, defer: bool, groups: Callable[[], list[list[Request]]]) -> Callable[[], None]:
            def run() -> None:
                lanes = LaneScheduler(self.looking, self.agent, defer_warmup=defer)
                made[name] = [one for part in groups() for group in lanes.run(part) for _, one in group]

            return run

        def fixed() -> list[list[Request]]:
            requests = self.requests()
            return [requests[at : at + self.lanes] for at in range(0, len(requests), self.lanes)]

        sides = {
            "continuous": Side(play("continuous", True, lambda: [self.requests()])),
            "warm-up apart": Side(play("warm-up apart", False, lambda: [self.requests()])),
            "fixed batches": Side(play("fixed batches", False, fixed)),
            "full batch with looks": Side(lambda: self.continues(self.looking)),
            "full batch without looks": Side(lambda: self.continues(self.blind)),
        }
        found = self.timed("batching", sides)
        batches = sum(one.nfe for one in made["continuous"]) / (self.lanes * self.looking.config.num_inference_steps)
        figures = [
            Figure("batching", f"{name} / continuous", (found[name] / found["continuous"]).tolist())
            for name in ("fixed batches", "warm-up apart")
        ]
        for name in ("full batch with looks", "full batch without looks"):
            share = batches * found[name] / found["continuous"]
            figures.append(
                Figure("batching", f"share of the ideal, {name.removeprefix('full batch ')}", share.tolist())
            )
        return figures

    def shares(self) -> list[Figure]:
        """What of a step of all lanes, with its look and decision, is spent where."""
        env, zeros = self.looking, np.zeros(self.lanes, np.int64)
        perception, backbone = env.perception, env.backbone
        texts, at = self.texts(self.lanes), torch.zeros(self.lanes, dtype=torch.long, device=backbone.device)
        env.reset(options={"prompt": texts, "seed": list(range(self.lanes))})
        latents, conditioning = env.latents.clone(), backbone.encode_prompts(texts)
        levels, timesteps = env.schedule.current.at(at), env.schedule.timesteps[at]
        pictures = torch.rand(self.lanes, 3, env.config.height, env.config.width).to(backbone.device)
        x0, observation = env.x0.clone(), None

        def predict(capture: bool) -> Callable[[], Any]:
            scale = env.config.guidance_scale
            return lambda: backbone.predict(latents, timesteps, levels, conditioning, scale, capture)

        def whole() -> None:
            seen, _, _, _, info = env.step(zeros)
            self.agent.act(seen, info["action_mask"])

        observation = env.reset(options={"prompt": texts})[0]
        sides = {
            "step": Side(whole, lambda: env.reset(options={"prompt": texts})),
            "denoiser": Side(predict(False)),
            "denoiser and capture": Side(predict(True)),
            "preview": Side(lambda: env.previewer.decode(x0)),
            "encoders and scorer": Side(lambda: perception.look(pictures, texts, True, None)),
            "policy": Side(lambda: self.agent.act(observation)),
        }
        if not perception.reads_latents and hasattr(perception.scorer, "score"):
            sides["scorer"] = Side(lambda: perception.scorer.score(pictures, texts))
        found = self.timed("shares", sides)
        parts = {"denoiser": found["denoiser"], "capture": found["denoiser and capture"] - found["denoiser"]}
        parts |= {name: found[name] for name in ("preview", "encoders and scorer", "policy")}
        parts["Python and the rest"] = found["step"] - sum(parts.values())
        if "scorer" in found:
            parts["scorer alone"] = found["scorer"]
        return [Figure("shares", f"{name} / step", (value / found["step"]).tolist()) for name, value in parts.items()]


COMPARISONS = ("diffusers", "mixed", "batched", "batching", "shares")


def table(figures: Sequence[Figure]) -> str:
    """All figures as text, one a line."""
    width = max(len(figure.name) for figure in figures)
    lines = [f"{'comparison':<10}  {'ratio':<{width}}  median  [lowest, highest]"]
    for figure in figures:
        spread = f"[{figure.low:.3f}, {figure.high:.3f}]"
        lines.append(f"{figure.comparison:<10}  {figure.name:<{width}}  {figure.median:6.3f}  {spread}")
    return "\n".join(lines)


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured, and how busy that was."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="addiff bench", description=(__doc__ or "").split("\n")[0])
    add_settings(parser)
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=COMPARISONS, help="of the comparisons")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each side is measured")
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="pictures of the comparison batching")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    options = parser.parse_intermixed_args(argv)
    if min(options.rounds, options.prompts) < 1:
        raise ValueError(f"rounds and prompts must be at least 1, got {options.rounds} and {options.prompts}")
    bench = Bench(read_chosen(options.settings), options.rounds, options.prompts)
    before, figures = machine(bench.looking.backbone.device), []
    for name in options.only:
        figures += getattr(bench, name)()
    print(f"{bench.chosen.env_id}, {bench.lanes} lanes, {options.rounds} rounds; {before}\n\n{table(figures)}")
    if options.json:
        facts = {"id": bench.chosen.env_id, "lanes": bench.lanes, "settings": bench.chosen.overrides, "machine": before}
        facts |= {"figures": [asdict(figure) for figure in figures], "seconds": bench.seconds}
        write_whole(options.json, json.dumps(facts, indent=2) + "\n")
    return 0
