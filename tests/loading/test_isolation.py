"""Frozen models compute the same whatever else the process does: other threads, torch's global modes, loads."""

import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from models import head, save
from transformers import CLIPTokenizer

import addiff_env
from addiff_env.agent import Agent, PolicyNet
from addiff_env.diffusion.backbones import count_flops, load_backbone
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.loading.isolation import exclusive, frozen, isolated
from addiff_env.loading.paths import resolve_model
from addiff_env.perception.encoders import load_clip, load_dino
from addiff_env.perception.scorers import PixelTextReward, load_scorer
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.types import Action

ID = "AdDiffusion-Tiny-v0"
Kwargs = dict[str, Any]
VARIANTS: list[Kwargs] = [
    {"mask": "neglected_token", "refine_mode": "rewind"},
    {"mask": "low_attention", "refine_mode": "in_place", "obs_mode": "dict"},
    {"mask": "random", "solver": "dpmpp_2m", "preview": "latent_rgb"},
    {"mask": "full", "refine_mode": "in_place", "finish_steps": 2, "eta": 0.5, "guidance_scale": 1.0},
]
ACTIONS = ([Action.CONTINUE, Action.REFINE], [Action.REFINE, Action.CONTINUE], [Action.STOP, Action.CONTINUE])


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make(kwargs: Kwargs, num_envs: int = 2, **more: Any) -> DiffusionDenoiseVectorEnv:
    mode = AutoresetMode.DISABLED
    env = gym.make_vec(ID, num_envs=num_envs, autoreset_mode=mode, render_mode="rgb_array", **kwargs | more).unwrapped
    assert isinstance(env, DiffusionDenoiseVectorEnv)
    return env


def play(env: DiffusionDenoiseVectorEnv, seed: int, rounds: int = 1) -> list[np.ndarray]:
    """Everything that an environment says of a few episodes with all actions."""
    seen: list[np.ndarray] = []

    def keep(value: Any) -> None:
        seen.extend(value.values() if isinstance(value, dict) else [value])

    for turn in range(rounds):
        things = ("circle", "star", "ring", "square")
        prompts = [f"a red {things[(seed + turn + lane) % 4]} above a star" for lane in range(env.num_envs)]
        keep(env.reset(options={"prompt": prompts, "seed": [seed + turn + lane for lane in range(env.num_envs)]})[0])
        for actions in ACTIONS:
            observation, reward, *_, info = env.step(np.resize(actions, env.num_envs))
            keep(observation)
            keep({"reward": reward, "clip": info["clip_score"], "flops": info["net_flops"]})
        keep({"pictures": np.stack(env.render() or ()), "latents": env.latents.numpy(), "mask": env.refine_mask})
    return [np.array(value) for value in seen]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that begin at the same moment, a thread each."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(begin, call) for call in calls]]


# ------------------------------------------------------------------ threads that share models


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("threads", [2, 4])
def test_environments_in_threads_do_as_alone(small_kwargs: Kwargs, threads: int) -> None:
    envs = [make(small_kwargs, **VARIANTS[i]) for i in range(threads)]
    assert len({id(env.backbone) for env in envs}) == len({id(env.perception.clip) for env in envs}) == 1
    alone = [play(env, 10 * i, 2) for i, env in enumerate(envs)]
    assert all(map(same, together([partial(play, env, 10 * i, 2) for i, env in enumerate(envs)]), alone))


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_other_kinds_of_models_in_threads(tiny_kwargs: Kwargs, tmp_path: Path, kind: str) -> None:
    settings = {"num_inference_steps": 4, "warmup_steps": 1, "max_nfe": 9, "attention_stride": 2, "dtype": "float32"}
    own = {"solver": "euler", "guidance_scale": 0.0} if kind == "flux" else {}
    made = partial(make, tiny_kwargs | settings | own, model=str(save(kind, tmp_path / kind)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the tokenizer does not know|prompt truncated")
        envs = [made() for _ in range(2)]
        alone = [play(env, i) for i, env in enumerate(envs)]
        assert all(map(same, together([partial(play, env, i) for i, env in enumerate(envs)]), alone))


def test_environments_are_made_while_others_step(small_kwargs: Kwargs) -> None:
    env = make(small_kwargs)
    alone, calls = play(env, 0, 4), [partial(play, env, 0, 4)]
    makers = [partial(make, small_kwargs, dtype=dtype) for dtype in ("bfloat16", "float16")]
    assert same(together([*calls, *makers])[0], alone)


@pytest.mark.usefixtures("hurried")
def test_encoders_and_scorers_in_threads(rng: np.random.Generator) -> None:
    tiny = {name: resolve_model(addiff_env.TINY[name]) for name in ("clip", "dino", "scorer")}
    clip, dino, scorer = load_clip(tiny["clip"], "cpu"), load_dino(tiny["dino"], "cpu"), load_scorer(tiny["scorer"])
    pictures = torch.from_numpy(rng.random((3, 3, 64, 64), np.float32))

    def look(start: int) -> list[np.ndarray]:
        found = []
        for i in range(start, start + 4):
            texts = [f"a red circle, {'star ' * (i % 7)}{i} {j}" for j in range(3)]
            found += [clip.text_features(texts), clip.image_features(pictures), dino.image_features(pictures)]
            found += [scorer.score(pictures, texts)]
        return [value.numpy() for value in found]

    alone = [look(start) for start in (0, 100, 200, 300)]
    for reader in (clip._texts, scorer._tokens):
        reader.clear()
    assert all(map(same, together([partial(look, start) for start in (0, 100, 200, 300)]), alone))


def test_counting_flops_leaves_other_threads_attention_as_it_is() -> None:
    """The counter writes attention out, for the whole process; others would compute with other kernels meanwhile."""
    inputs = [torch.randn(2, 4, 64, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    kernels, counted = set(), threading.Event()

    def attend() -> None:
        while not counted.is_set():
            with isolated():
                kernels.add((torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()))

    def count() -> None:
        for _ in range(20):
            count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(*inputs), "cpu")
        counted.set()

    together([attend, count, attend])
    assert kernels == {(True, True)}


@pytest.mark.usefixtures("hurried")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
def test_other_methods_mount_the_same_network(small_kwargs: Kwargs) -> None:
    env, other = make(small_kwargs), make(small_kwargs)
    items = [Item("a red circle", 3, "colors"), Item("a star above a green ring", 4, "position")]
    methods = [make_method(name, env) for name in ("sag-2", "attend-and-excite-2", "euler-2", "ddim-2")]

    def pictures(method: Any) -> list[np.ndarray]:
        return [result.picture for group in method.make(items) for _, result in group]

    def near(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
        """Attend-and-Excite's gradients differ in their last digits from call to call, in one thread, too (AVX2)."""
        return all(np.abs(a.astype(int) - b).max() <= 2 for a, b in zip(one, other, strict=True))

    calls = [*(partial(pictures, method) for method in methods), partial(play, other, 5, 2)]
    alone = [call() for call in calls]
    for chosen in ([0, 1, 4], [1, 2, 3, 4]):
        found = dict(zip(chosen, together([calls[index] for index in chosen]), strict=True))
        assert all((near if index == 1 else same)(found[index], alone[index]) for index in chosen)


@pytest.mark.usefixtures("hurried")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
def test_a_tokenizer_is_used_by_one_thread_at_a_time(small_kwargs: Kwargs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast tokenizers keep padding and truncation as state: a call beside another one pads as that one does."""
    using: set[tuple[int, int]] = set()  # tokenizer, thread
    shared = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            use = id(self), threading.get_ident()
            outer = use not in using
            using.add(use)
            time.sleep(0.002)  # for another thread to come in
            shared.extend(other for other in tuple(using) if other[0] == use[0] and other != use)
            try:
                return method(self, *args, **kwargs)
            finally:
                if outer:
                    using.remove(use)

        return call

    env, other = make(small_kwargs), make(small_kwargs)
    methods = [make_method(name, env) for name in ("sag-2", "attend-and-excite-2", "attend-and-excite-2", "euler-2")]
    for name in ("__call__", "tokenize"):
        monkeypatch.setattr(CLIPTokenizer, name, watched(getattr(CLIPTokenizer, name)))
    items = [Item(f"a red circle above star {i}", i, "colors") for i in range(3)]
    together([*(partial(list, method.make(items)) for method in methods), partial(play, other, 5, 2)])
    assert not shared


def test_pipelines_in_threads(small_kwargs: Kwargs) -> None:
    envs = [make(small_kwargs, 3) for _ in range(2)]
    agent = Agent(PolicyNet(envs[0].perception.parts), {"observation": envs[0].perception.parts})
    pipelines = [AdaptivePipeline(env, agent) for env in envs]

    def pictures(pipeline: AdaptivePipeline, seed: int) -> list[np.ndarray]:
        return [np.asarray(image) for image in pipeline(["a star", "a red ring"] * 2, [seed, 1, 2, 3]).images]

    calls = [partial(pictures, pipeline, 7 + i) for i, pipeline in enumerate(pipelines)]
    calls.append(partial(pictures, pipelines[0], 20))  # whose lanes another thread needs, too
    alone = [call() for call in calls]
    assert all(map(same, together(calls), alone))


# ------------------------------------------------------------------ loading in threads

LOADING_IN_THREADS = """
import logging, random, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
import gymnasium as gym
import addiff_env

def states():
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate(), torch.get_default_dtype()

root, before = list(logging.getLogger().handlers), states()
with ThreadPoolExecutor(4) as pool:
    envs = list(pool.map(lambda dtype: gym.make("AdDiffusion-Tiny-v0", dtype=dtype), ["float32", "bfloat16"] * 2))
assert states() == before
assert len({id(env.unwrapped.vector.backbone) for env in envs}) == 2
assert logging.getLogger().handlers == root
assert torch.nn.Linear(2, 2).weight.device.type == "cpu" and torch.nn.Linear(2, 2)(torch.ones(2)).isfinite().all()
gym.make("AdDiffusion-Tiny-v0").reset(seed=0)
"""


def test_the_first_environments_of_a_process_are_made_in_threads(tiny_kwargs: Kwargs) -> None:
    subprocess.run([sys.executable, "-c", LOADING_IN_THREADS], check=True, timeout=300)


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()


def test_no_load_draws_random_numbers(small_kwargs: Kwargs, tmp_path: Path) -> None:
    env = make(small_kwargs)
    parts = env.perception.parts
    Agent(PolicyNet(parts), {"observation": parts, "hidden": 128}).save(tmp_path / "agent")
    del env
    before = random_states()
    make(small_kwargs, preview="latent_rgb")
    for model in ("sdxl", "flux"):
        folder = save(model, tmp_path / model)
        load_backbone(str(folder), attention_stride=2)
    load_scorer("aesthetic:" + str(head(tmp_path / "head.safetensors")) + ",clip=" + addiff_env.TINY["clip"])
    Agent.load(tmp_path / "agent")
    with MODES["everything"]():
        reward = PixelTextReward.from_pretrained(resolve_model(addiff_env.TINY["scorer"]))
    assert reward.place.dtype == torch.float32 and not reward.place.is_inference()
    assert random_states() == before


@pytest.mark.gpu
def test_loads_and_threads_on_a_gpu(small_kwargs: Kwargs) -> None:
    torch.cuda.init()
    before = torch.cuda.get_rng_state_all()
    envs = together([partial(make, small_kwargs, device="cuda", obs_backend="torch") for _ in range(2)])
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), before))

    def latents(env: DiffusionDenoiseVectorEnv, seed: int) -> torch.Tensor:
        env.reset(options={"prompt": ["a red circle", "a star"], "seed": [seed, 1]})
        for actions in ACTIONS:
            env.step(np.array(actions))
        return env.latents.cpu()

    calls = [partial(latents, env, seed) for seed, env in enumerate(envs)]
    alone = [call() for call in calls]
    assert all(torch.equal(*pair) for pair in zip(together(calls), alone, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_load_that_fails_leaves_nothing_behind(small_kwargs: Kwargs, tmp_path: Path, dtype: str) -> None:
    (tmp_path / "unet").mkdir()
    for part in Path(small_kwargs["model"]).iterdir():
        if part.name != "unet":
            (tmp_path / part.name).symlink_to(part)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "norm_num_groups": 7}')
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(
        Path(small_kwargs["model"], "unet", "diffusion_pytorch_model.safetensors")
    )
    before = random_states()
    with pytest.raises(ValueError, match=str(tmp_path)):
        make(small_kwargs, model=str(tmp_path), dtype=dtype)
    assert torch.get_default_dtype() == torch.float32 and random_states() == before
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


# ------------------------------------------------------------------ global modes


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype  # as the user left it
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        assert torch.empty(0).device.type == device
        torch.set_default_device(None)


@contextmanager
def everything() -> Iterator[None]:
    with default_dtype(torch.float64), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        yield


MODES: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
    "everything": everything,
}


@pytest.fixture(scope="module")
def plain(small_kwargs: Kwargs) -> list[list[np.ndarray]]:
    return [play(make(small_kwargs, **variant), 3) for variant in VARIANTS]


@pytest.mark.parametrize("mode", MODES)
def test_an_environment_is_the_same_under_any_mode(
    small_kwargs: Kwargs, plain: list[list[np.ndarray]], mode: str
) -> None:
    turn = list(MODES).index(mode)
    places = (("made", "stepped"), ("made",) if turn % 2 else ("stepped",))
    for which, where in ((turn % 4, places[0]), ((turn + 1) % 4, places[1])):
        with MODES[mode]() if "made" in where else nullcontext():
            env = make(small_kwargs, **VARIANTS[which])
        with MODES[mode]() if "stepped" in where else nullcontext():
            seen = play(env, 3)
        assert same(seen, plain[which])
        del env


@pytest.mark.parametrize("mode", MODES)
def test_models_called_by_themselves_are_the_same_under_any_mode(tmp_path: Path, mode: str) -> None:
    tiny = {name: resolve_model(addiff_env.TINY[name]) for name in ("clip", "dino", "scorer")}
    pictures = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    observations = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    texts = ["a star", "a ring"]

    def look() -> list[np.ndarray]:
        clip, dino, scorer = load_clip(tiny["clip"], "cpu"), load_dino(tiny["dino"], "cpu"), load_scorer(tiny["scorer"])
        agent = Agent.load(tmp_path)
        found = [clip.similarity(pictures, texts), clip.text_features(texts), dino.image_features(pictures)]
        found += [scorer.score(pictures, texts), *(load_clip(tiny["clip"], "cpu").image_features(pictures),)]
        return [value.numpy() for value in found] + [agent.logits(observations), agent.act(observations)]

    Agent(PolicyNet({"a": 2, "b": 1}), {"observation": {"a": 2, "b": 1}, "hidden": 128}).save(tmp_path)
    expected = look()
    with MODES[mode]():
        seen = look()  # loads them anew: nobody has held them
    assert same(seen, expected) and same(look(), expected)


@pytest.mark.parametrize("mode", ["float64", "meta", "everything"])
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
def test_other_methods_are_the_same_under_any_mode(small_kwargs: Kwargs, mode: str) -> None:
    env = make(small_kwargs)
    names = ("ddim-2", "best-of-2:ddim-2", "oracle-stop:ddim-2", "unipc-2", "sag-2", "attend-and-excite-2")

    def pictures() -> list[np.ndarray]:
        methods = [make_method(name, env) for name in names]
        items = [Item("a red circle", 3, "colors")]
        return [made.picture for method in methods for group in method.make(items) for _, made in group]

    expected = pictures()
    with MODES[mode]():
        assert same(pictures(), expected)


def test_latents_that_ask_for_gradients_do_not_make_the_environment_ask(small_kwargs: Kwargs) -> None:
    env = make(small_kwargs)
    env.reset(options={"latents": torch.randn(2, *env.latent_shape, requires_grad=True)})
    assert not env.latents.requires_grad


def test_modes_are_those_of_each_thread(small_kwargs: Kwargs, plain: list[list[np.ndarray]]) -> None:
    def under(mode: str) -> list[np.ndarray]:
        env = make(small_kwargs, **VARIANTS[0])
        with MODES[mode]():
            return play(env, 3)

    with default_dtype(torch.float64):
        seen = together([partial(under, mode) for mode in ("autocast", "inference", "meta context", "grad")])
    assert all(same(one, plain[0]) for one in seen)


# ------------------------------------------------------------------ the contexts themselves


def test_a_default_dtype_set_meanwhile_stays() -> None:
    try:
        with isolated():
            torch.set_default_dtype(torch.float64)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_from_within_a_models_call_is_refused_and_not_waited_for() -> None:
    class Model:
        pass

    with pytest.raises(RuntimeError, match="load it before"), frozen(Model()), exclusive():
        pass
    with isolated(), exclusive(), frozen(Model()), exclusive():
        pass  # whoever has everything already goes on


def test_exclusive_is_alone() -> None:
    inside: list[int] = []
    most: list[int] = []

    def compute() -> None:
        for _ in range(50):
            with isolated():
                inside.append(1)
                inside.pop()

    def load() -> None:
        for _ in range(10):
            with isolated(), exclusive():
                most.append(len(inside))

    together([compute, load, load, compute])
    assert set(most) == {0} and len(most) == 20


def test_costs_are_asked_for_by_threads_that_compute(small_kwargs: dict[str, Any]) -> None:
    """Python 3.11's `functools.cached_property` locks one attribute of all objects: who counts would wait for ever."""
    env = gym.make_vec(ID, 1, **small_kwargs).unwrapped
    inside, counting = threading.Event(), threading.Event()
    found: list[float] = []

    def computes() -> None:
        with isolated():
            inside.set()
            counting.wait(5)
            time.sleep(0.2)  # the other thread waits for this one
            found.append(make_method("ddim-3", env).total_flops(6))

    def counts() -> None:
        inside.wait(5)
        counting.set()
        found.append(make_method("ddim-3", env).total_flops(6))

    threads = [threading.Thread(target=one, daemon=True) for one in (computes, counts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 2 and found[0] == found[1] > 0
