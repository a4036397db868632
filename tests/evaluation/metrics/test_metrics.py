"""Metrics by name: which apply, which is the headline, and what is said of those that cannot be had."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from PIL import Image

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.base import Metric, columns_of, score_pictures
from addiff_env.evaluation.metrics.detectors import Detection
from addiff_env.evaluation.metrics.geneval import GenEval, judge_picture, open_geneval
from addiff_env.evaluation.metrics.registry import (
    default_metrics,
    margins_of,
    open_metric,
    open_metrics,
    primary_score,
    protocol_scores,
    reported_score,
    scores_of_all_methods,
)
from addiff_env.evaluation.run.memory import peak_memory, watched
from addiff_env.perception.features import Perception
from addiff_env.types import ResultRow

TINY = [Item("a red circle", 0, "colors"), Item("two blue stars", 1, "counting")]
DRAWN = [Item("A cat wearing sunglasses", 0, "drawbench")]


@pytest.fixture(scope="module")
def perception(small_kwargs: dict[str, Any]) -> Perception:
    return gym.make_vec(
        "AdDiffusion-Tiny-v0", 1, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs
    ).unwrapped.perception


class Named:
    """A metric of items of one category, that says how many pictures it was shown."""

    def __init__(self, name: str, category: str) -> None:
        self.name, self.category, self.shown = name, category, 0

    def columns(self, item: Item) -> tuple[str, ...]:
        return (self.name,) if item.category == self.category else ()

    def score(self, pictures: np.ndarray, items: Any) -> list[tuple[dict[str, float], str]]:
        self.shown += len(pictures)
        return [({self.name: float(picture[0, 0, 0])}, f"{self.name} of {item.seed}") for picture, item in
                zip(pictures, items, strict=True)]  # fmt: skip


def test_metrics_see_the_items_they_are_for_and_no_others() -> None:
    items = [Item(f"p{k}", k, "even" if k % 2 == 0 else "odd") for k in range(40)]
    pictures = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    metrics: list[Metric] = [Named("a", "even"), Named("b", "odd"), Named("c", "even")]
    scored = score_pictures(metrics, pictures, items)
    for k, (scores, words) in enumerate(scored):
        assert scores == ({"a": float(k), "c": float(k)} if k % 2 == 0 else {"b": float(k)})
        assert words == (f"a of {k}; c of {k}" if k % 2 == 0 else f"b of {k}")
    assert [metric.shown for metric in metrics] == [20, 20, 20]  # type: ignore[attr-defined]
    assert columns_of(metrics, items[0]) == ("a", "c")


def test_the_environments_own_scores_are_what_policies_see(perception: Perception, rng: np.random.Generator) -> None:
    metrics, skipped = open_metrics(["checker", "clip_score", "reward_score"], perception, TINY)
    pictures = rng.integers(0, 255, (2, 64, 64, 3), np.uint8)
    scored = score_pictures(metrics, pictures, TINY)
    look = perception.look(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, [i.prompt for i in TINY])
    assert [scores["clip_score"] for scores, _ in scored] == pytest.approx(look.clip_score.tolist(), abs=1e-5)
    assert [scores["reward_score"] for scores, _ in scored] == pytest.approx(look.reward_score.tolist(), abs=1e-4)
    assert all(scores["success"] == 0 and words for scores, words in scored) and not skipped


def test_the_checker_judges_its_own_world_only(perception: Perception) -> None:
    assert default_metrics(TINY)[0] == "checker" and "checker" not in default_metrics(DRAWN)
    with pytest.raises(ValueError, match="'checker' reads the embedded world's pictures only"):
        open_metric("checker", perception, DRAWN)
    metrics, _ = open_metrics(["clip_score"], perception, DRAWN)
    assert columns_of(metrics, DRAWN[0]) == ("clip_score",)  # nothing that is called success


def test_what_is_unknown_or_does_not_apply_is_refused(perception: Perception) -> None:
    with pytest.raises(ValueError, match="unknown metric 'beauty'; known: checker, clip_score.*hpsv2.1.*t2i_compbench"):
        open_metrics(["beauty"], perception, TINY)
    with pytest.raises(ValueError, match="each once"):
        open_metrics(["clip_score", "clip_score"], perception, TINY)
    with pytest.raises(ValueError, match="each once"):
        open_metrics([], perception, TINY)
    with pytest.raises(ValueError, match="'non_spatial' judges none of the 2 items, e.g. 'a red circle'"):
        open_metric("non_spatial", perception, TINY)


def test_missing_weights_are_refused_or_left_out(perception: Perception) -> None:
    settings = ["clip_score", "imagereward:/nowhere/ImageReward.pt", "hpsv2.1:/nowhere/HPS.pt", "aesthetic:/no/a.pth"]
    with pytest.raises(FileNotFoundError, match="metric 'imagereward:/nowhere.*download.*allow_missing=true"):
        open_metrics(settings, perception, TINY)
    metrics, skipped = open_metrics(settings, perception, TINY, allow_missing=True)
    assert [metric.name for metric in metrics] == ["clip_score"] and list(skipped) == settings[1:]
    with pytest.raises(ValueError, match="of which none can be had"):
        open_metrics(settings[1:], perception, TINY, allow_missing=True)
    with pytest.raises(ValueError, match="known options"):  # a mistake is no missing weight
        open_metrics(["imagereward:x.pt,colour=red"], perception, TINY, allow_missing=True)


def test_a_scorer_by_its_setting_scores_pictures(
    perception: Perception, small_looks: dict[str, str], rng: np.random.Generator
) -> None:
    metric = open_metric(f"clipscore:{small_looks['clip']}", perception, DRAWN)
    pictures = rng.integers(0, 255, (1, 96, 64, 3), np.uint8)
    ((scores, words),) = score_pictures([metric], pictures, TINY[:1])
    own = open_metric("clip_score", perception, DRAWN)
    assert scores["clipscore"] == pytest.approx(score_pictures([own], pictures, TINY[:1])[0][0]["clip_score"], abs=1e-5)
    assert words == ""


def test_scores_of_rows_made_before_do_not_lead_where_a_method_lacks_them() -> None:
    def row(method: str, **scores: float) -> ResultRow:
        return ResultRow(method, "p", 0, "c", "b", "s", method, "float32", "1", scores=scores)

    old = [row("ddim-50", hpsv21=0.3, clip_score=0.2)] * 3
    assert scores_of_all_methods([*old, row("agent", clip_score=0.1)]) == [["clip_score"]] * 4
    assert primary_score(scores_of_all_methods(old)) == "hpsv21"
    with pytest.raises(ValueError, match=r"no score in common \(ddim-50: clip_score, hpsv21; agent: aesthetic\)"):
        scores_of_all_methods([*old, row("agent", aesthetic=5.0)])
    assert reported_score([*old, row("agent", clip_score=0.1)]) == "clip_score"
    assert reported_score([*old, row("agent", clip_score=0.1)], "hpsv21") == "hpsv21"
    assert reported_score(old) == "hpsv21"
    assert reported_score([*old, row("agent", aesthetic=5.0)]) == "hpsv21"  # of most pictures
    assert reported_score([row("agent"), row("ddim-50", success=math.nan)]) == "no score"


@pytest.mark.parametrize(
    ("measured", "wanted", "primary"),
    [
        ([["success", "requirements", "clip_score"]] * 2, None, "success"),
        ([["clip_score", "reward_score", "hpsv2.1"]] * 2, None, "hpsv2.1"),
        ([["clip_score", "reward_score"]], None, "clip_score"),
        ([["clip_score", "reward_score"]], "reward_score", "reward_score"),
        ([["blip_vqa", "t2i_compbench"], ["spatial", "t2i_compbench"]], None, "t2i_compbench"),
    ],
)
def test_the_primary_score_is_one_that_policies_do_not_see(
    measured: list[list[str]], wanted: str | None, primary: str
) -> None:
    assert primary_score(measured, wanted) == primary
    with pytest.raises(ValueError, match="no score 'beauty' is measured; measured are: "):
        primary_score(measured, "beauty")


def test_margins_are_in_the_scores_unit() -> None:
    assert margins_of("success") == margins_of("geneval") == {"margin": 0.02, "worthwhile": 0.01}
    assert margins_of("hpsv2.1")["margin"] < margins_of("success")["margin"] < margins_of("imagereward")["margin"]


# --------------------------------------------------------------------------- GenEval


class Colors:
    def of(self, picture: Image.Image) -> Any:
        return lambda objects: ["red"] * len(objects)


def test_geneval_judges_by_the_metadata() -> None:
    metadata = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    items = [Item("a photo of a red cup", 0, "colors", metadata=metadata)]
    items.append(replace(items[0], seed=1, metadata={**metadata, "include": [{"class": "dog", "count": 1}]}))
    seen = [Detection("cup", 0.9, (0, 0, 5, 5))]
    metric = GenEval(lambda picture: seen, Colors())  # type: ignore[arg-type]
    scored = metric.score(np.zeros((2, 8, 8, 3), np.uint8), items)
    assert scored == [({"geneval": 1.0}, ""), ({"geneval": 0.0}, "expected dog>=1, found 0")]
    assert scored[1][1] == judge_picture(seen, items[1].metadata).reason
    assert metric.columns(Item("a cup", 0, "colors")) == ()


def test_geneval_without_its_detector_says_what_to_pass() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere/detector.*geneval:<folder of a detector>"):
        open_geneval("/nowhere/detector", "cpu")
    with pytest.raises(ValueError, match="known options: colors"):
        open_geneval("x,color=y", "cpu")


def row(category: str, method: str = "ddim-5", **scores: float) -> ResultRow:
    return ResultRow(method, "p", 0, category, "b", "s", "p", "float32", "1", scores=scores)


def test_protocols_report_by_tag_and_category() -> None:
    rows = [row("colors", geneval=1.0), row("colors", geneval=0.0), row("position", geneval=0.0)]
    rows += [row("position", method="agent", geneval=1.0), row("color", t2i_compbench=0.5), row("x", clip_score=1.0)]
    found = protocol_scores(rows)
    assert found["geneval"]["ddim-5"] == {"colors": 0.5, "position": 0.0, "overall": 0.25}  # of tags, not of pictures
    assert found["geneval"]["agent"] == {"position": 1.0, "overall": 1.0}
    assert found["t2i_compbench"] == {"ddim-5": {"color": 0.5}}
    assert protocol_scores(rows[-1:]) == {}


# --------------------------------------------------------------------------- memory


def test_peak_memory_is_that_of_the_process() -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kept = np.ones(30_000_000, np.uint8)
    peak = peak_memory(torch.device("cpu"))
    assert peak >= 1024 * int(status["VmRSS"].split()[0]) > len(kept)
    assert [group for group, seen in watched(iter([1, 2]), torch.device("cpu")) if seen >= peak] == [1, 2]
