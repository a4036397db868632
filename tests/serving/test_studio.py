"""Pictures made while somebody watches are those that nobody watched."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from addiff_env.cli.web import fixed_picture
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.rule_policies import RefineAlways, ThresholdRule
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.serving.limits import PictureRequest
from addiff_env.serving.studio import TINY_PRESETS, Frame, Result, Stopwatch, Studio
from addiff_env.tiny.prompts import parse_caption
from addiff_env.types import Action

ASKED = PictureRequest("a red circle", 3, 5.0, 4)


def test_each_step_is_seen_and_the_results_are_the_pipelines(studio: Studio, pipe: AdaptivePipeline) -> None:
    events = list(studio.run(ASKED))
    alone = pipe(ASKED.prompt, seeds=3, target_nfe=5.0)
    frames = [one for one in events if isinstance(one, Frame) and one.method == "agent"]
    ours, fixed = (one for one in events if isinstance(one, Result))
    assert (ours.picture == np.asarray(alone.images[0])).all() and ours.nfe == alone.nfe[0] == frames[-1].nfe
    assert ours.net_flops == alone.net_flops[0] and (frames[-1].picture == ours.picture).all()
    assert [one.action for one in frames if one.action is not None] == alone.actions[0]
    assert [one.action for one in frames[:2]] == [None, None]  # the warm-up
    assert frames[0].reward_score is None and all(one.reward_score is not None for one in frames[1:])
    for one in frames[2:]:
        assert one.probabilities is not None and sum(one.probabilities) == pytest.approx(1)
    for some in (frames, [one for one in events if isinstance(one, Frame) and one.method == "fixed"]):
        seconds = [one.seconds for one in some]
        assert seconds == sorted(seconds) and seconds[0] > 0
    ((_, expected),) = next(iter(FixedSteps(pipe.env, 4).make([Item(ASKED.prompt, 3, "")])))
    assert (fixed.picture == expected.picture).all() and (fixed.nfe, fixed.net_flops) == (4, expected.net_flops)
    assert [one.nfe for one in events if isinstance(one, Frame) and one.method == "fixed"] == [1, 2, 3, 4]


def test_without_a_comparison_nothing_else_is_made(studio: Studio) -> None:
    events = list(studio.run(PictureRequest("a star", 0, 5.0, None)))
    assert {one.method for one in events} == {"agent"} and isinstance(events[-1], Result)


def test_a_refinement_shows_where(pipe: AdaptivePipeline) -> None:
    studio = Studio(
        AdaptivePipeline(make_agent_env(pipe.agent, 1, price_range=None), ThresholdRule(4, 100.0, 6)), fixed_picture
    )
    frames = [one for one in studio.run(PictureRequest("a star", 0, 12, None)) if isinstance(one, Frame)]
    refined = [one for one in frames if one.action == Action.REFINE]
    assert refined and all(one.mask is not None and one.mask.shape == (16, 16) for one in refined)
    assert all(one.mask is None for one in frames if one.action != Action.REFINE)
    assert all(one.probabilities is None for one in frames)  # a rule has none


def test_a_visitor_who_leaves_frees_the_lane(pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = AdaptivePipeline(make_agent_env(pipe.agent, 1, price_range=None, max_nfe=10_000), RefineAlways())
    studio, evaluated, real = Studio(endless, fixed_picture), list[float](), endless.env.backbone.predict

    def predict(*args: object, **kwargs: object) -> object:
        evaluated.append(time.monotonic())
        return real(*args, **kwargs)

    monkeypatch.setattr(endless.env.backbone, "predict", predict)
    events = studio.run(PictureRequest("a star", 0, 10_000, None))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert endless("a star", seeds=1, max_nfe=5).nfe == [5]  # which waits for its turn
    made = len(evaluated)
    assert endless("a star", seeds=1, max_nfe=5).nfe == [5] and len(evaluated) == made + 5  # nothing else runs
    assert not any(thread.name == "addiff-lane" and thread.is_alive() for thread in threading.enumerate())


def test_closing_the_studio_ends_what_runs(pipe: AdaptivePipeline) -> None:
    endless = AdaptivePipeline(make_agent_env(pipe.agent, 1, price_range=None, max_nfe=10_000), RefineAlways())
    studio = Studio(endless, fixed_picture)
    events = studio.run(PictureRequest("a star", 0, 10_000, None))
    next(events)
    studio.close()
    assert not any(isinstance(one, Result) for one in events)


def test_visitors_do_not_change_each_others_pictures(studio: Studio) -> None:
    asked = [PictureRequest(prompt, seed, 5.0, 3) for seed, prompt in enumerate(["a star", "a red circle"] * 2)]

    def results(request: PictureRequest) -> list[Result]:
        return [one for one in studio.run(request) if isinstance(one, Result)]

    alone = [results(request) for request in asked]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(results, asked))
    for one, other in zip(alone, together, strict=True):
        for before, after in zip(one, other, strict=True):
            assert (before.picture == after.picture).all() and before.nfe == after.nfe


def test_an_error_reaches_the_visitor_and_the_next_one_is_served(
    studio: Studio, pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="out of memory"):
        broken.setattr(pipe.env.backbone, "predict", fails)
        list(studio.run(ASKED))
    assert isinstance(list(studio.run(ASKED))[-1], Result)


def test_presets_are_made_by_the_agent(studio: Studio, pipe: AdaptivePipeline) -> None:
    presets = studio.presets(["a star", "a red circle"])
    alone = pipe("a red circle", seeds=1, **studio.limits.budget.arguments(studio.limits.budget.start))
    assert [one.seed for one in presets] == [0, 1] and presets[1].nfe == alone.nfe[0]
    assert (presets[1].picture == np.asarray(alone.images[0])).all()
    assert studio.presets([]) == []
    assert studio.preset_prompts(2) == pipe.env.prompts[:2]
    assert all(parse_caption(prompt).caption == prompt for prompt in TINY_PRESETS)


def test_what_the_model_cannot_read_is_said(studio: Studio) -> None:
    assert studio.remarks("a red circle") == []
    (unknown,) = studio.remarks("a red zebra")
    assert "zebra" in unknown and "red" not in unknown
    assert any("does not read" in said for said in studio.remarks("a red circle and " * 30))


def test_the_exact_checker_judges_what_it_knows(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(one.satisfied is None for one in studio.run(ASKED) if isinstance(one, Result))  # other models
    monkeypatch.setattr(Studio, "is_tiny", True)
    judged = [one for one in studio.run(ASKED) if isinstance(one, Result)]
    assert all(one.satisfied is False and one.reason for one in judged)  # random weights draw no circle
    free = PictureRequest("red circle", 3, 5.0, None)
    assert all(one.satisfied is None for one in studio.run(free) if isinstance(one, Result))


def test_a_stopped_watch_stands() -> None:
    clock = Stopwatch(torch.device("cpu"))
    with clock.stopped() as before:
        time.sleep(0.05)
    with clock.stopped() as after:
        pass
    assert 0 < before < after < before + 0.05
