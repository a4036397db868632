"""Negative prompts: what diffusers makes of them, lane by lane, in episodes, methods, checkpoints and rows."""

import json
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from gymnasium.vector import AutoresetMode
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import addiff_env
from addiff_env.agent import Agent
from addiff_env.diffusion.backbones import load_backbone
from addiff_env.env import DiffusionDenoiseEnv, DiffusionDenoiseVectorEnv
from addiff_env.env.baseline_cache import baseline_configuration, score_fixed_steps
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.methods.rule_policies import StopAt
from addiff_env.evaluation.run.fingerprint import environment_of
from addiff_env.evaluation.run.made_with import differing_values
from addiff_env.evaluation.run.rows import append_rows, merge_rows, read_rows
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.types import ResultRow

PROMPTS, SEEDS = ["a red circle", "two blue squares and a star"], [3, 4]
NEGATIVE = "a large green ring"
Kwargs = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("negative")
    made = {kind: models.save(kind, root / kind) for kind in models.BUILDERS}
    return made | {"sdxl-empty": models.save("sdxl", root / "sdxl-empty", force_zeros=False)}


@pytest.fixture
def kwargs(request: pytest.FixtureRequest, tiny_kwargs: Kwargs, folders: dict[str, Path]) -> Kwargs:
    kind = getattr(request, "param", "sd")
    own = {"solver": "euler", "guidance_scale": 0.0} if kind == "flux" else {"guidance_scale": 4.0}
    steps = {"dtype": "float32", "num_inference_steps": 4, "warmup_steps": 1, "max_nfe": 8, "attention_stride": 2}
    return {**addiff_env.TINY, **tiny_kwargs, **steps, **own, "model": str(folders[kind])}


def vector(kwargs: Kwargs, num_envs: int = 2, **more: Any) -> DiffusionDenoiseVectorEnv:
    return DiffusionDenoiseVectorEnv(num_envs, AutoresetMode.DISABLED, **{**kwargs, **more})


def finish(env: DiffusionDenoiseVectorEnv, **options: Any) -> torch.Tensor:
    n = env.num_envs
    env.reset(options={"prompt": PROMPTS[:n], "seed": SEEDS[:n], **options})
    while not env.done.all():
        env.step(np.zeros(n, int))
    return env.latents.clone()


# ------------------------------------------------------------------ parity


def theirs(folder: Path, prompt: str, seed: int, negative: str | None) -> torch.Tensor:
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline(
        prompt,
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=4.0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


@pytest.mark.parametrize(
    ("kind", "negative"),
    [("sd", NEGATIVE), ("sd", "a star " * 40), *(("sdxl", text) for text in (None, "", NEGATIVE)), ("sdxl-empty", "")],
)
@pytest.mark.filterwarnings("ignore:prompt truncated")
def test_lanes_are_what_diffusers_makes(
    tiny_kwargs: Kwargs, folders: dict[str, Path], kind: str, negative: str | None
) -> None:
    """As a setting, and as a lane's own beside one that has another; None and "" are two things to SDXL's pipeline."""
    steps = {"dtype": "float32", "num_inference_steps": 4, "warmup_steps": 1, "max_nfe": 8, "attention_stride": 2}
    kwargs = {**addiff_env.TINY, **tiny_kwargs, **steps, "guidance_scale": 4.0, "model": str(folders[kind])}
    expected = theirs(folders[kind], PROMPTS[0], SEEDS[0], negative)
    by_setting = finish(vector(kwargs, 1, negative_prompt=negative))
    torch.testing.assert_close(by_setting, expected, rtol=0, atol=1e-5)
    by_lane = finish(vector(kwargs), negative_prompt=[negative, "a pink cross"])
    torch.testing.assert_close(by_lane[:1], expected, rtol=0, atol=1e-5)
    if negative == NEGATIVE:
        assert (expected - theirs(folders[kind], PROMPTS[0], SEEDS[0], None)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def backbones(folders: dict[str, Path]) -> list[Any]:
    return [load_backbone(str(folders[kind]), attention_stride=2) for kind in ("sd", "sdxl")]


@given(st.lists(st.sampled_from([None, "", NEGATIVE, "two blue stars", "a red circle"]), min_size=3, max_size=3))
@hypothesis_settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_encodings_are_put_together_text_by_text(backbones: list[Any], negatives: list[str | None]) -> None:
    for backbone in backbones:
        prompts = ["a red circle", "", NEGATIVE]
        together = backbone.encode_prompts(prompts, negatives)
        assert together.negative is not None
        for lane, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
            alone = backbone.encode_prompts([prompt], negative)
            assert alone.negative is not None
            assert torch.equal(together.embeddings[lane], alone.embeddings[0])
            assert torch.equal(together.negative[lane], alone.negative[0])
            if negative is not None:
                assert torch.equal(alone.negative, backbone.encode_prompts([negative]).embeddings)


# ------------------------------------------------------------------ episodes


def test_a_lane_keeps_its_own_through_refinements_and_checkpoints(kwargs: Kwargs) -> None:
    """Lanes with different ones, refined, saved and continued, equal single environments that have them as settings."""
    plan = [2, 0, 0, 0, 0, 0, 0]
    envs, other = vector(kwargs, 3), vector(kwargs, 3)
    texts = [NEGATIVE, None, "a pink cross"]
    envs.reset(options={"prompt": [PROMPTS[0]] * 3, "seed": [7] * 3, "negative_prompt": texts})
    envs.step(np.full(3, plan[0]))
    state = envs.state_dict()
    assert state["negative_prompt"] == texts
    other.load_state_dict(state)
    for env in (envs, other):
        for action in plan[1:]:
            if not env.done.all():
                env.step(np.full(3, action))
    assert torch.equal(envs.latents, other.latents) and other.negative_prompt == texts
    for lane, text in enumerate(texts):
        single = DiffusionDenoiseEnv(**{**kwargs, "negative_prompt": text})
        single.reset(options={"prompt": PROMPTS[0], "seed": 7})
        for action in plan:
            if not single.vector.done.all():
                single.step(action)
        torch.testing.assert_close(single.latents[0], envs.latents[lane], rtol=0, atol=1e-4)
    assert (envs.latents[0] - envs.latents[1]).abs().max() > 1e-4


def test_the_next_episode_has_the_settings_again(kwargs: Kwargs) -> None:
    env = vector(kwargs, negative_prompt="a pink cross")
    finish(env, negative_prompt=[NEGATIVE, None])
    assert env.negative_prompt == [NEGATIVE, "a pink cross"]
    env.reset(options={"reset_mask": np.array([True, False])})
    assert env.negative_prompt == ["a pink cross"] * 2


@pytest.mark.parametrize(("kind", "texts"), [("sd", (2, 2)), ("sdxl", (1, 2)), ("sdxl-empty", (2, 2))])
def test_texts_are_paid_for(
    tiny_kwargs: Kwargs, folders: dict[str, Path], kwargs: Kwargs, kind: str, texts: Any
) -> None:
    """SDXL's zeros cost nothing, a negative prompt does, whether it is the setting's or a lane's."""
    kwargs = {**kwargs, "model": str(folders[kind]), "warmup_steps": 0}
    env, with_setting = vector(kwargs), vector(kwargs, negative_prompt=NEGATIVE)
    read = env.flops_per_call["start"] - texts[0] * env.flops_per_call["text"]  # what encoders and scorer read
    assert with_setting.flops_per_call["start"] - read == pytest.approx(texts[1] * env.flops_per_call["text"])
    env.reset(options={"negative_prompt": [NEGATIVE, None]})
    assert (env.net_flops - read).tolist() == pytest.approx(
        [number * env.flops_per_call["text"] for number in reversed(texts)]
    )


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("kwargs", ["flux"], indirect=True)
def test_flux_has_none_and_says_so(kwargs: Kwargs) -> None:
    with pytest.raises(ValueError, match=f"negative_prompt '{NEGATIVE}'.*unconditional pass"):
        vector(kwargs, negative_prompt=NEGATIVE)
    env = vector(kwargs)
    with pytest.raises(ValueError, match="unconditional pass"):
        env.reset(options={"negative_prompt": ["", None]})
    with pytest.raises(ValueError, match="takes no negative_prompt"):
        env.backbone.encode_prompts(PROMPTS, NEGATIVE)
    pipeline = AdaptivePipeline(env, StopAt(2, 4))
    with pytest.raises(ValueError, match="unconditional pass"):
        pipeline(PROMPTS, SEEDS, negative_prompt=NEGATIVE)
    with pytest.raises(ValueError, match="unconditional pass"):
        AdaptivePipeline(env, StopAt(2, 4), negative_prompt=NEGATIVE)
    assert len(pipeline(PROMPTS, SEEDS).images) == 2


def test_without_guidance_there_is_nothing_to_lead_away_from(kwargs: Kwargs) -> None:
    with pytest.raises(ValueError, match="guidance_scale 1 has not"):
        vector(kwargs, negative_prompt=NEGATIVE, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (NEGATIVE, TypeError, "one negative_prompt per lane"),
        ([NEGATIVE], ValueError, "1 negative_prompt values for 2 lanes"),
        ([NEGATIVE, 7], TypeError, "7"),
        ([NEGATIVE, ["a"]], TypeError, "list"),
    ],
)
def test_wrong_ones_are_shown(kwargs: Kwargs, value: Any, kind: type[Exception], words: str) -> None:
    env = vector(kwargs)
    with pytest.raises(kind, match=words):
        env.reset(options={"negative_prompt": value})
    with pytest.raises(ValueError, match="negative_prompt"):
        vector(kwargs, negative_prompt=7)


# ------------------------------------------------------------------ the pipeline


def test_the_pipelines_negative_prompts(kwargs: Kwargs) -> None:
    """One for all, one per prompt, the pipeline's own, the environment's: what the environment makes of each."""

    def pictures(env: DiffusionDenoiseVectorEnv, own: str | None = None, **call: Any) -> list[np.ndarray]:
        pipeline = AdaptivePipeline(env, StopAt(2, 4), negative_prompt=own)
        return [np.asarray(image) for image in pipeline([PROMPTS[0]] * 3, [5] * 3, **call).images]

    env = vector(kwargs)
    plain, led = pictures(env), pictures(vector(kwargs, negative_prompt=NEGATIVE))
    assert (plain[0] != led[0]).any()
    for found in (pictures(env, NEGATIVE), pictures(env, negative_prompt=NEGATIVE)):
        assert all((a == b).all() for a, b in zip(found, led, strict=True))
    mixed = pictures(env, NEGATIVE, negative_prompt=[None, NEGATIVE, "a pink cross"])
    assert (mixed[0] == led[0]).all() and (mixed[1] == led[0]).all() and (mixed[2] != led[0]).any()
    with pytest.raises(ValueError, match="3 prompts but 2 negative prompts"):
        pictures(env, negative_prompt=["a", "b"])


# ------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("method", ["ddim-4", "stop-4", "best-of-1:ddim-4", "unipc-4", "sag-4", "attend-and-excite-2"])
def test_every_method_heeds_the_setting(kwargs: Kwargs, method: str) -> None:
    items = [Item(PROMPTS[0], 5, "colors")]
    made = []
    for negative in (None, NEGATIVE):
        env = vector(kwargs, 1, negative_prompt=negative)
        made.append([pair[1].picture for group in make_method(method, env).make(items) for pair in group][0])
    assert (made[0] != made[1]).any()
    if method == "ddim-4":
        latents = theirs(Path(kwargs["model"]), PROMPTS[0], 5, NEGATIVE)
        expected = (env.backbone.decode(latents)[0] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.abs(made[1].astype(int) - expected).max() <= 1


def test_a_stop_in_hindsight_heeds_it_too(kwargs: Kwargs) -> None:
    items = [Item(PROMPTS[0], 5, "colors")]
    made = []
    for negative in (None, NEGATIVE):
        method = make_method("oracle-stop:ddim-2", vector(kwargs, 1, negative_prompt=negative, finish_steps=2))
        made.append([pair[1].picture for group in method.make(items) for pair in group][0])
    assert (made[0] != made[1]).any()


def test_baselines_are_of_the_same_negative_prompt(kwargs: Kwargs) -> None:
    plain, led = vector(kwargs, 1), vector(kwargs, 1, negative_prompt=NEGATIVE)
    assert "negative_prompt" not in baseline_configuration(plain, 4)  # files of earlier releases stay what they were
    assert baseline_configuration(led, 4)["negative_prompt"] == NEGATIVE
    scores = [next(score_fixed_steps(env, 4, [(PROMPTS[0], 5)])) for env in (plain, led)]
    assert scores[0][2:] != scores[1][2:]


def row(**more: Any) -> ResultRow:
    return ResultRow("ddim-4", "a star", more.pop("seed", 0), "colors", "m", "ddim-4", "ddim-4", "float32", "1", **more)


def test_rows_say_it_where_there_is_one(tmp_path: Path) -> None:
    rows = [row(), row(negative_prompt=""), row(negative_prompt=NEGATIVE)]
    append_rows(tmp_path / "rows.jsonl", rows)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line.get("negative_prompt", "none") for line in written] == ["none", "", NEGATIVE]
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert len({one.key for one in rows}) == 3 and len(rows[0].key) == 8
    with pytest.raises(ValueError, match="2 values of negative_prompt"):
        merge_rows([[row(), row(seed=1, negative_prompt=NEGATIVE)]], [("a star", 0), ("a star", 1)])


def test_a_run_with_another_one_is_another_run() -> None:
    agent = Agent.from_pretrained("addiff_env:tiny/weights/agent")
    plain, led = environment_of(agent, {}), environment_of(agent, {"negative_prompt": NEGATIVE})
    assert "negative_prompt" not in plain and led["negative_prompt"] == NEGATIVE
    assert differing_values(plain, led)
    assert environment_of(agent, {"decode_memory": 1.0}) == plain  # where and in what slices: no other picture
