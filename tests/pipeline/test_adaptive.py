"""The pipeline as users of diffusers' pipelines call it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation.methods.rule_policies import RefineAlways, StopAt, ThresholdRule
from addiff_env.pipeline import AdaptivePipeline, LaneScheduler, make_agent_env

ID = "AdDiffusion-Tiny-v0"
Kwargs = dict[str, Any]
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def agent(small_kwargs: Kwargs) -> Agent:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {"env": {"id": ID, "kwargs": small_kwargs}, "hidden": 8}
        parts = make_agent_env(Agent(PolicyNet({"x": 1}), config), 1).observer.parts
        return Agent(PolicyNet(parts, 8), config | {"observation": parts})


@pytest.fixture(scope="module")
def pipe(agent: Agent) -> AdaptivePipeline:
    """It stops after four steps."""
    made = AdaptivePipeline(make_agent_env(agent, 3), StopAt(4, 6))
    made.set_progress_bar_config(disable=True)
    return made


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------ what comes back


def test_an_output_has_pictures_and_a_value_of_each(pipe: AdaptivePipeline) -> None:
    output = pipe(PROMPTS, seeds=[1, 2])
    assert [image.size for image in output.images] == [(64, 64)] * 2 and output["images"] is output.images
    assert output.prompts == PROMPTS and output.seeds == [1, 2] and output.notes == ["", ""]
    assert output.nfe == [4, 4] and output.actions == [[0, 0, 1]] * 2
    assert all(value > 0 for value in output.net_flops + output.seconds)
    assert len(output.reward_score) == 2 and all(np.isfinite(output.reward_score))
    assert output.previews is None and output.masks is None
    assert pipe(PROMPTS, seeds=[1, 2], return_dict=False)[0][0].size == (64, 64)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_pictures_come_in_diffusers_forms(pipe: AdaptivePipeline, number: int) -> None:
    asked = {"prompt": ["a star"] * number, "seeds": range(number)}
    pil, array_form, tensor = (pipe(**asked, output_type=kind).images for kind in ("pil", "np", "pt"))
    assert len(pil) == number and array_form.shape == (number, 64, 64, 3) and tensor.shape == (number, 3, 64, 64)
    assert array_form.dtype == np.float32 and tensor.dtype == torch.float32
    for one, other, third in zip(pil, array_form, tensor, strict=True):
        assert (np.asarray(one) == np.rint(other * 255)).all() and (other == third.permute(1, 2, 0).numpy()).all()
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt, got 'latent'"):
        pipe("a star", output_type="latent")


def test_previews_and_masks_on_demand(agent: Agent) -> None:
    pipe = AdaptivePipeline(make_agent_env(agent, 2), ThresholdRule(4, 100.0, 6))
    output = pipe(PROMPTS, [1, 2], previews=True, masks=True, output_type="np")
    for actions, previews, masks in zip(output.actions, output.previews, output.masks, strict=True):
        assert len(previews) == len(actions) and len(masks) == actions.count(2) > 0
        assert previews[0].dtype == np.float32 and masks[0].shape == (16, 16)


# ------------------------------------------------------------------ what goes in


def test_images_of_a_prompt_follow_one_another(pipe: AdaptivePipeline) -> None:
    output = pipe(PROMPTS, seeds=[10, 20], num_images_per_prompt=2)
    assert output.prompts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2 and output.seeds == [10, 11, 20, 21]
    assert pipe(PROMPTS, seeds=range(4), num_images_per_prompt=2).seeds == [0, 1, 2, 3]
    assert pipe("a star", seeds=7, num_images_per_prompt=3).seeds == [7, 8, 9]
    assert len(set(pipe("a star", num_images_per_prompt=3).seeds)) == 3
    for wrong in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="num_images_per_prompt"):
            pipe("a star", num_images_per_prompt=wrong)
    with pytest.raises(ValueError, match="2 prompts of 2 images but 3 seeds"):
        pipe(PROMPTS, seeds=[1, 2, 3], num_images_per_prompt=2)
    with pytest.raises(ValueError, match="seed"):
        pipe("a star", seeds=2**63 - 1, num_images_per_prompt=2)


def test_a_generator_gives_the_noise_that_diffusers_draws(pipe: AdaptivePipeline) -> None:
    by_seed = pipe(PROMPTS, seeds=[5, 6])
    by_list = pipe(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)])
    assert by_list.seeds == [5, 6]
    for one, other in zip(by_seed.images, by_list.images, strict=True):
        assert np.abs(array(one) - array(other)).max() <= 1
    shape = pipe.env.latent_shape
    single, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first = pipe(PROMPTS, generator=single)
    expected = torch.randn(2, *shape, generator=theirs)  # as diffusers draws a batch
    assert torch.equal(single.get_state(), theirs.get_state())
    started = dict[int, torch.Tensor]()

    def watch(pipeline: Any, step: int, timestep: int, given: Kwargs) -> None:
        started.setdefault(given["index"], given["latents"])

    again = pipe(PROMPTS, generator=torch.Generator().manual_seed(5), callback_on_step_end=watch)
    by_hand = pipe.env.reset(options={"prompt": [*PROMPTS, ""], "latents": torch.cat([expected, expected[:1]])})
    assert by_hand is not None and pipe.env.nfe[0] == 2
    for one, other in zip(first.images, again.images, strict=True):
        assert (array(one) == array(other)).all()
    assert np.abs(array(first.images[0]) - array(by_seed.images[0])).max() <= 1
    assert np.abs(array(first.images[1]) - array(by_seed.images[1])).max() > 1
    later = pipe(PROMPTS[1], generator=single)  # which goes on where it was left
    assert np.abs(array(later.images[0]) - array(first.images[1])).max() > 1


@pytest.mark.parametrize("wrap", [list, tuple, iter, np.array, lambda items: dict.fromkeys(items).keys()], ids=range(5))
def test_prompts_come_in_any_ordered_form(pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch, wrap: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(LaneScheduler, "run", lambda self, requests: asked.extend(requests) or [])
    pipe(wrap(PROMPTS), wrap([3, 4]), wrap(["a", "b"]))
    expected = list(zip(PROMPTS, [3, 4], ["a", "b"], strict=True))
    assert [(one.prompt, one.seed, one.negative_prompt) for one in asked] == expected


@pytest.mark.parametrize("prompts", [{"a", "b"}, {"a": 1}, 5, np.array(5)], ids=["set", "dict", "number", "array"])
def test_what_has_no_order_is_no_list_of_prompts(pipe: AdaptivePipeline, prompts: Any) -> None:
    with pytest.raises(TypeError, match="must be a string"):
        pipe.stream(prompts)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"generator": 5}, TypeError, "torch.Generator or a list of them, got int"),
        ({"generator": [5, 6]}, TypeError, "got int"),
        ({"generator": [torch.Generator()]}, ValueError, "1 generators for 2 images"),
        ({"generator": torch.Generator(), "seeds": [1, 2]}, ValueError, "give one of them"),
        ({"max_nfe": 2}, ValueError, "max_nfe 2 leaves no decision"),
        ({"max_nfe": "9"}, ValueError, "max_nfe"),
        ({"target_nfe": 9.0}, ValueError, "price"),
        ({"height": 63}, ValueError, "height"),
        ({"negative_prompt": ["a"]}, ValueError, "2 prompts but 1 negative"),
        ({"negative_prompt": [1, 2]}, TypeError, "1"),
        ({"negative_prompt": 5}, ValueError, "2 prompts but 1 negative"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "got 'noise'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch, given: Kwargs, kind: type[Exception], words: str
) -> None:
    monkeypatch.setattr(type(pipe.env), "reset", None)
    for call in (pipe, pipe.stream):
        with pytest.raises(kind, match=words):
            call(PROMPTS, **given)  # type: ignore[operator]


def test_a_budget_holds_for_one_call(agent: Agent) -> None:
    pipe = AdaptivePipeline(make_agent_env(agent, 2), RefineAlways())  # without end
    assert pipe(PROMPTS, [1, 2]).nfe == [12, 12] and pipe(PROMPTS, [1, 2], max_nfe=7).nfe == [7, 7]
    assert pipe(PROMPTS, [1, 2], max_nfe=20).nfe == [20, 20] and pipe(PROMPTS, [1, 2]).nfe == [12, 12]


def test_another_size_is_made_by_the_same_models(pipe: AdaptivePipeline) -> None:
    wide = pipe(PROMPTS, [1, 2], height=32, width=96)
    assert [image.size for image in wide.images] == [(96, 32)] * 2
    env = pipe._resized
    assert env is not None and env.backbone is pipe.env.backbone
    assert pipe(PROMPTS, [1, 2], height=32, width=96, output_type="np").images.shape == (2, 32, 96, 3)
    assert pipe._resized is env  # not made anew
    assert pipe(PROMPTS, [1, 2]).images[0].size == (64, 64)


# ------------------------------------------------------------------ prices


class PricedAgent(Agent):
    """Stops the sooner the dearer an evaluation is."""

    def act(self, obs: Any, action_mask: Any = None, deterministic: bool = True, rng: Any = None) -> np.ndarray:
        price, step = obs[:, -9], np.rint(obs[:, -3] * 6)
        return np.where(step >= 4 - price, 1, 0).astype(np.int64)


def priced_agent(kwargs: Kwargs, table: Any = None) -> Agent:
    env = {"id": "AdDiffusion-Tiny-v0", "kwargs": {**kwargs, "price_range": [0.001, 0.016]}}
    parts = {"clip_image": 128, "clip_text": 128, "timestep": 128, "price": 1, "quality": 8}
    kept = {} if table is None else {"prices": table}
    return PricedAgent(PolicyNet(parts, 4), {"env": env, "hidden": 4, "observation": parts} | kept)


def test_a_price_decides_what_a_picture_costs(small_kwargs: Kwargs) -> None:
    points = [
        {"price": price, "nfe": nfe, "net_flops": nfe, "reward": 0.5, "quality": 0.5}
        for price, nfe in ((0.001, 5), (0.004, 4), (0.016, 3))
    ]
    agent = priced_agent(small_kwargs, {"points": points, "measured_on": {}})
    pipeline = AdaptivePipeline(make_agent_env(agent, 2), agent)
    for price, nfe in ((0.001, 5), (0.004, 4), (0.016, 3)):
        made = pipeline(PROMPTS, [1, 2], price=price)
        assert set(zip(made.nfe, made.price, strict=True)) == {(nfe, price)}
        assert pipeline(PROMPTS[:1], 1, target_nfe=nfe).nfe == [nfe]
    named, drawn = (pipeline.env.reset(options=o)[1]["price"] for o in ({"price": 0.002}, {"seed": [1, 2]}))
    assert named.tolist() == [0.002] * 2 and len(set(drawn)) == 2  # the environment is as it was


def test_a_call_names_price_or_target(agent: Agent, small_kwargs: Kwargs) -> None:
    priced = AdaptivePipeline(make_agent_env(priced_agent(small_kwargs), 1), priced_agent(small_kwargs))
    assert priced("a star", 0).price == [priced.agent.middle_price] == [0.004]
    with pytest.raises(ValueError, match="price or target_nfe"):
        priced("a star", 0, price=0.004, target_nfe=4)
    for price in (0.1, 0, -1, float("nan"), "0.004"):
        with pytest.raises(ValueError, match="price must"):
            priced("a star", 0, price=price)
    with pytest.raises(ValueError, match="addiff agent table"):
        priced("a star", 0, target_nfe=4)
    plain = AdaptivePipeline(make_agent_env(agent, 1), agent)
    for asked in ({"price": 0.004}, {"target_nfe": 4}):
        with pytest.raises(ValueError, match="no price input"):
            plain("a star", 0, **asked)
    with pytest.raises(ValueError, match=r"price_range \[0.001, 0.016\], the environment has \[0.001, 0.1\]"):
        AdaptivePipeline(make_agent_env(priced_agent(small_kwargs), 1, price_range=[0.001, 0.1]), priced.agent)
    rule = AdaptivePipeline(make_agent_env(agent, 1), StopAt(3, 6))
    with pytest.raises(ValueError, match="target_nfe=4"):
        rule("a star", 0, target_nfe=4)
    assert rule("a star", 0, price=0.25).price == [0.25]


# ------------------------------------------------------------------ callbacks, bars


def test_a_callback_sees_every_step_and_stops_a_lane(pipe: AdaptivePipeline) -> None:
    seen: dict[int, list[int]] = {0: [], 1: []}

    def callback(pipeline: AdaptivePipeline, step: int, timestep: int, given: Kwargs) -> Kwargs:
        assert pipeline is pipe and given["latents"].shape == pipe.env.latent_shape
        assert given["preview"].shape == (64, 64, 3) and given["mask"].shape == (16, 16)
        assert given["prompt"] == PROMPTS[given["index"]] and given["action_probabilities"] is None
        seen[given["index"]].append(step)
        given["stop"] = given["index"] == 1 and given["nfe"] >= 3
        return given

    names = ["latents", "preview", "mask", "action_probabilities"]
    output = pipe(PROMPTS, [1, 2], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert seen == {0: [1, 2, 3, 4, 4], 1: [1, 2, 3, 3]}
    assert output.nfe == [4, 3] and output.actions[1] == [0, 1]
    with pytest.raises(TypeError, match="None or a dictionary, got bool"):
        pipe(PROMPTS, [1, 2], callback_on_step_end=lambda *given: True)  # type: ignore[arg-type, return-value]
    assert pipe(PROMPTS, [1, 2]).nfe == [4, 4]


def test_an_agent_tells_what_it_thought(agent: Agent) -> None:
    pipe, told = AdaptivePipeline(make_agent_env(agent, 2), agent), []
    names = ["action_probabilities"]
    pipe(
        PROMPTS,
        [1, 2],
        callback_on_step_end=lambda _, step, timestep, given: told.append(given),
        callback_on_step_end_tensor_inputs=names,
    )
    for step in told:
        shares = step["action_probabilities"]
        assert (shares is None) == (step["action"] is None)
        assert shares is None or (shares.argmax() == step["action"] and shares.sum() == pytest.approx(1))


def test_the_bar_counts_pictures_and_can_be_told_off(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = AdaptivePipeline(make_agent_env(agent, 2), StopAt(4, 6))
    pipe(PROMPTS, [1, 2])
    shown = capsys.readouterr().err
    assert "2/2" in shown and "mean NFE 4.0" in shown and "image/s" in shown
    pipe.set_progress_bar_config(disable=True)
    pipe(PROMPTS, [1, 2])
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------ streams, threads


def test_pictures_are_streamed_as_they_finish(agent: Agent) -> None:
    class ByWords(StopAt):
        def act_in(self, obs: Any, action_mask: Any, episodes: Any) -> np.ndarray:
            done = np.rint(np.asarray(obs)[:, -3] * 6)
            return np.where(done >= [len(made.prompt.split()) for made in episodes], 1, 0)

    pipe = AdaptivePipeline(make_agent_env(agent, 3), ByWords(3, 6))
    made = list(pipe.stream(["a star above a ring", "a ring", "a star"], [1, 2, 3]))
    assert [one.index for one in made] == [1, 2, 0] and [one.nfe for one in made] == [2, 2, 5]
    assert [one.seed for one in made] == [2, 3, 1]


def test_one_stream_at_a_time(pipe: AdaptivePipeline) -> None:
    """Another thread waits for its turn; the same one is told, instead of waiting for itself."""
    expected = [array(image) for image in pipe(PROMPTS * 3, range(6)).images]

    def pictures(number: int) -> list[np.ndarray]:
        made = sorted(pipe.stream(PROMPTS * 3, range(6)), key=lambda one: one.index)
        return [array(one.image) for one in made]

    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(pictures, range(3)):
            assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    stream = pipe.stream(PROMPTS * 3, range(6))
    next(stream)
    with pytest.raises(RuntimeError, match="stream of this pipeline is open in this thread"):
        pipe("a star", 1)
    waiting = threading.Thread(target=pictures, args=(0,))
    waiting.start()
    assert waiting.is_alive()
    stream.close()  # type: ignore[attr-defined]
    waiting.join(60)
    assert not waiting.is_alive() and pipe("a star", 1).nfe == [4]


@settings(max_examples=3)
@given(st.lists(st.sampled_from([*PROMPTS, "a star"]), min_size=1, max_size=5), st.integers(1, 2))
def test_a_call_is_its_stream_in_order(pipe: AdaptivePipeline, prompts: list[str], each: int) -> None:
    numbers = range(len(prompts) * each)
    output = pipe(prompts, numbers, num_images_per_prompt=each)
    for one in pipe.stream(prompts, numbers, num_images_per_prompt=each):
        assert one.prompt == output.prompts[one.index] and one.seed == one.index
        assert np.abs(array(one.image) - array(output.images[one.index])).max() <= 1


# ------------------------------------------------------------------ loading


def test_it_is_loaded_as_diffusers_pipelines_are(agent: Agent, small_kwargs: Kwargs, tmp_path: Any) -> None:
    agent.save(tmp_path)
    for named in (tmp_path, str(tmp_path), agent):
        pipe = AdaptivePipeline.from_pretrained(named, num_envs=2, torch_dtype=torch.bfloat16, device="cpu")
        assert pipe.env.num_envs == 2 and pipe.env.config.dtype == "bfloat16" and pipe.agent.fingerprint
    assert pipe.to("cpu", torch.float32) is pipe and pipe.env.config.dtype == "float32"
    assert pipe.to(torch.bfloat16).env.config.dtype == "bfloat16" and pipe.env.num_envs == 2
    with pytest.raises(ValueError, match="'AdDiffusion-SD16-v0' is no registered environment"):
        AdaptivePipeline.from_pretrained(agent, env_id="AdDiffusion-SD16-v0")
    with pytest.raises(TypeError, match="steps"):
        AdaptivePipeline.from_pretrained(agent, steps=7)


def test_without_arguments_it_is_the_embedded_worlds() -> None:
    pipe = AdaptivePipeline.from_pretrained()
    output = pipe("a red circle left of a blue star", seeds=7)
    assert output.images[0].size == (64, 64) and 4 <= output.nfe[0] <= 32
