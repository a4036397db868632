"""Comparisons of steps: with diffusers, of lanes at mixed points, with single environments, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv

from addiff_env.cli.bench.rounds import Figure, Side
from addiff_env.cli.bench.subject import BLIND, Subject
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.loading.isolation import isolated


def diffusers(subject: Subject) -> list[Figure]:
    """All lanes continue, without and with looks, against diffusers' own pipeline on the same networks."""
    envs = {"without looks": subject.blind, "with looks": subject.looking}
    if subject.acting is not subject.looking:
        envs["with the agent's looks"] = subject.acting
    sides = {name: Side(partial(subject.continues, env)) for name, env in envs.items()}
    return subject.against("diffusers", sides | {"diffusers": Side(_pipeline_call(subject))}, "diffusers")


def _pipeline_call(subject: Subject) -> Callable[[], None]:
    """Diffusers' own pipeline on all lanes."""
    from diffusers import DDIMScheduler

    from addiff_env.evaluation.methods.diffusers_methods import make_pipeline

    config = subject.looking.config
    pipeline = make_pipeline(subject.looking.backbone, DDIMScheduler, None, "addiff bench")

    @isolated()
    def call() -> None:
        pipeline(
            subject.texts(subject.lanes),
            height=config.height,
            width=config.width,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(subject.lanes)],
            output_type="np",
        )

    return call


def mixed(subject: Subject) -> list[Figure]:
    """Steps of lanes at mixed points of the schedule, against lanes in step."""
    steps = subject.lanes + 4
    env = subject.env(**BLIND | {"num_inference_steps": 2 * steps, "warmup_steps": 0, "max_nfe": None})
    ready = np.zeros(env.num_envs, np.int64)

    def start(apart: bool) -> None:
        env.park(np.arange(env.num_envs))
        for lane in range(env.num_envs):
            mask = np.arange(env.num_envs) == lane
            env.reset(options={"prompt": subject.texts(1), "seed": [lane], "reset_mask": mask})
            if apart:
                env.step(ready)
        env.step(ready)

    def run() -> None:
        for _ in range(3):
            env.step(ready)

    sides = {"mixed": Side(run, partial(start, True)), "in step": Side(run, partial(start, False))}
    return subject.against("mixed", sides, "in step")


def batched(subject: Subject) -> list[Figure]:
    """Steps of as many lanes in single environments, against one vector environment, and of the denoiser alone."""
    from stable_baselines3.common.vec_env import DummyVecEnv

    def one() -> gym.Env[Any, Any]:
        return gym.make(subject.chosen.env_id, **subject.chosen.overrides)

    makers, zeros = [one] * subject.lanes, np.zeros(subject.lanes, np.int64)
    dummy, sync = DummyVecEnv(makers), SyncVectorEnv(makers)

    def steps(env: Any) -> None:
        for _ in range(2):
            env.step(zeros)

    env = subject.looking
    all_lanes, lane = (evaluation(env, lanes, capture=True) for lanes in (subject.lanes, 1))
    sides = {
        "DummyVecEnv": Side(partial(steps, dummy), dummy.reset),
        "SyncVectorEnv": Side(partial(steps, sync), sync.reset),
        "vector": Side(partial(steps, env), lambda: env.reset(seed=0)),
        "denoiser, lane by lane": Side(lambda: [lane() for _ in range(subject.lanes)]),
        "denoiser, all lanes": Side(all_lanes),
    }
    found = subject.timed("batched", sides)
    dummy.close()
    sync.close()
    pairs = [("DummyVecEnv", "vector"), ("SyncVectorEnv", "vector"), ("denoiser, lane by lane", "denoiser, all lanes")]
    return [Figure("batched", f"{a} / {b}", (found[a] / found[b]).tolist()) for a, b in pairs]


def evaluation(env: DiffusionDenoiseVectorEnv, lanes: int, capture: bool) -> Callable[[], Any]:
    """One evaluation of the denoiser, for so many lanes at the beginning of the schedule."""
    backbone = env.backbone
    at = torch.zeros(lanes, dtype=torch.long, device=backbone.device)
    latents = torch.randn(lanes, *env.latent_shape, generator=torch.Generator().manual_seed(0))
    latents, conditioning = (
        latents.to(backbone.device, backbone.dtype),
        backbone.encode_prompts(["a red circle"] * lanes),
    )
    levels, timesteps = env.schedule.current.at(at), env.schedule.timesteps[at]
    return lambda: backbone.predict(latents, timesteps, levels, conditioning, env.config.guidance_scale, capture)


def shares(subject: Subject) -> list[Figure]:
    """What of a step of all lanes, with its look and decision, is spent where, for the looks of the agent."""
    env, lanes, zeros = subject.acting, subject.lanes, np.zeros(subject.lanes, np.int64)
    texts = subject.texts(lanes)

    def start() -> Any:
        return env.reset(options={"prompt": texts, "seed": list(range(lanes))})

    def whole() -> None:
        seen, _, _, _, info = env.step(zeros)
        subject.agent.act(seen, info["action_mask"])

    observation, _ = start()
    sides = {
        "step": Side(whole, start),
        "denoiser": Side(evaluation(env, lanes, capture=False)),
        "denoiser and capture": Side(evaluation(env, lanes, capture=True)),
        "policy": Side(lambda: subject.agent.act(observation)),
    }
    looks = _looks(env, texts)
    found = subject.timed("shares", sides | looks)
    parts = {"denoiser": found["denoiser"], "capture": found["denoiser and capture"] - found["denoiser"]}
    parts |= {name: found[name] for name in ("preview", "encoders and scorer", "policy") if name in found}
    parts["Python and the rest"] = found["step"] - sum(parts.values())
    if "scorer alone" in found:
        parts["scorer alone"] = found["scorer alone"]
    return [Figure("shares", f"{name} / step", (value / found["step"]).tolist()) for name, value in parts.items()]


def _looks(env: DiffusionDenoiseVectorEnv, texts: list[str]) -> dict[str, Side]:
    """What a look at all lanes of ``env`` consists of."""
    perception, lanes = env.perception, env.num_envs
    if not perception.reads_pictures:
        everybody = np.arange(lanes)
        latents = env.observer.latents_to_score(env.state, everybody)
        return {"encoders and scorer": Side(lambda: perception.look(None, texts, True, latents))}
    x0 = env.x0.clone()
    pictures = torch.rand(lanes, 3, env.config.height, env.config.width, device=x0.device)
    sides = {
        "preview": Side(lambda: env.previewer.decode(x0)),
        "encoders and scorer": Side(lambda: perception.look(pictures, texts, True, None)),
    }
    if not perception.reads_latents and "reward" in perception.reads:
        sides["scorer alone"] = Side(lambda: perception.scorer.score(pictures, texts))
    return sides
