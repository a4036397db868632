"""Methods by name."""

from __future__ import annotations

from collections.abc import Sequence

from addiff_env.agent import Agent
from addiff_env.diffusion.samplers import SOLVERS
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions, solver_method
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.rule_policies import Policy, RandomPolicy, RefineAlways, StopAt, ThresholdRule
from addiff_env.evaluation.methods.samplers import FixedSteps, WordCount
from addiff_env.evaluation.methods.search import BestOf, OracleStop

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
