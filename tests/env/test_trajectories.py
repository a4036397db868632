"""Recorded trajectories and their pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from addiff_env.env.trajectories import MOST_COLUMNS, filmstrip_figure, overlay, record_trajectories, thinned
from addiff_env.sb3.vec_env import make_lanes
from addiff_env.stats import spread
from addiff_env.types import Action

PROMPTS = ["a red circle", "a blue star and a red ring", "three green squares"]
LISTS = [[0, 2, 1], [1], [0, 0, 0, 2, 1]]  # each lane's actions


class Scripted:
    """Each lane's actions from a list; what follows is to continue."""

    def __init__(self, lists: list[list[int]]) -> None:
        self.lists, self.calls = lists, 0

    def __call__(self, observation: np.ndarray, masks: np.ndarray) -> np.ndarray:
        self.calls += 1
        return np.array([own[self.calls - 1] if self.calls <= len(own) else 0 for own in self.lists])


@pytest.fixture
def lanes(small_kwargs):
    return make_lanes("AdDiffusion-Tiny-v0", 3, **small_kwargs)


def test_trajectories_hold_what_was_seen_and_done(lanes, small_kwargs):
    strips = record_trajectories(lanes, Scripted(LISTS), PROMPTS, [1, 2, 3])
    for lane, (strip, actions) in enumerate(zip(strips, LISTS, strict=True)):
        assert [frame["action"] for frame in strip] == [*actions, None]
        assert [frame["mask"] is not None for frame in strip] == [*(action == 2 for action in actions), False]
        nfe = [frame["nfe"] for frame in strip]
        spent = {Action.CONTINUE: 1, Action.REFINE: 2, Action.STOP: 0}
        assert np.diff(nfe).tolist() == [spent[Action(action)] for action in actions]
        np.testing.assert_array_equal(strip[-1]["picture"], lanes.final_image(lane))
        assert strip[-1]["score"] == pytest.approx(float(lanes.reward_score[lane]))
    alone = make_lanes("AdDiffusion-Tiny-v0", 1, **small_kwargs)
    (own,) = record_trajectories(alone, Scripted(LISTS[2:]), PROMPTS[2:], [3])
    for ours, theirs in zip(own, strips[2], strict=True):
        assert np.abs(ours["picture"].astype(int) - theirs["picture"]).max() <= 1


def test_only_the_lanes_that_are_shown_are_recorded(lanes):
    whole = record_trajectories(lanes, Scripted(LISTS), PROMPTS, [1, 2, 3])
    strips = record_trajectories(lanes, Scripted(LISTS), PROMPTS, [1, 2, 3], shown=[0, 2])
    assert lanes.done.all() and [len(strip) for strip in strips] == [len(whole[0]), len(whole[2])]
    for strip, lane in zip(strips, (0, 2), strict=True):
        np.testing.assert_array_equal(strip[-1]["picture"], whole[lane][-1]["picture"])
    assert record_trajectories(lanes, Scripted(LISTS), PROMPTS, [1, 2, 3], shown=[]) == []


def frames_of(actions):
    picture = np.full((8, 8, 3), 200, np.uint8)
    numbers = {"picture": picture, "mask": None, "step": 0, "score": 0.5}
    return [{**numbers, "action": action, "nfe": k} for k, action in enumerate([*actions, None])]


def test_long_trajectories_keep_their_decisions():
    actions = [0] * 60
    actions[31] = actions[57] = 2
    kept = thinned(frames_of([*actions, 1]))
    numbers = [frame["nfe"] for frame in kept]
    assert len(kept) == MOST_COLUMNS and numbers == sorted(numbers)
    assert {0, 31, 57, 60, 61} <= set(numbers)
    short = frames_of([0, 2, 1])
    assert thinned(short) == short
    assert len(thinned(frames_of([2] * 40))) == MOST_COLUMNS


def test_the_figure_has_a_row_per_trajectory_and_names_what_was_done():
    figure = filmstrip_figure([("a $5 note", frames_of([0, 2, 1])), ("another", frames_of([1]))])
    rows, columns = 2, 4
    assert len(figure.axes) == rows * columns
    titles = [axis.get_title().split("\n")[0] for axis in figure.axes]
    assert titles == ["continue", "refine", "stop", "final", "stop", "final", "", ""]
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["a $5 note", "another"]
    buffer = io.BytesIO()
    figure.savefig(buffer)
    assert np.asarray(Image.open(buffer).convert("L")).std() > 10
    with pytest.raises(ValueError, match=r"\[4, 0\]"):
        filmstrip_figure([("some", frames_of([0, 2, 1])), ("none", [])])
    with pytest.raises(ValueError, match=r"\[\]"):
        filmstrip_figure([])


def test_overlay_keeps_the_mask_and_darkens_the_rest():
    picture = np.full((8, 8, 3), 200, np.uint8)
    mask = np.zeros((2, 2))
    mask[0, 0] = 1
    shown = overlay(picture, mask)
    assert (shown[1:3, 1:3] == 200).all()
    assert (shown[4:, 4:] == 70).all()


def test_spread_is_even():
    assert spread(range(100), 3) == [0, 50, 99] and spread([1, 2], 5) == [1, 2] and spread([], 4) == []
