import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from addiff_env.stats import wilson_interval
from addiff_env.tiny.checker import Found, check_picture, match_objects
from addiff_env.tiny.measures import attention, bars, footprint, pictures, quality
from addiff_env.tiny.measures.bars import Bar
from addiff_env.tiny.measures.pictures import Sample
from addiff_env.tiny.prompt_splits import load_split
from addiff_env.tiny.prompts import CATEGORIES, COLORS
from addiff_env.tiny.scenes import Background, Scene, SceneObject, render
from addiff_env.tiny.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def draw(*objects: tuple[str, str, float, float, float]) -> np.ndarray:
    items = [SceneObject(s, c, x, y, r, tuple(v / 255 for v in COLORS[c])) for s, c, x, y, r in objects]  # type: ignore[arg-type]
    return render(Scene(tuple(items), Background((0.5, 0.5, 0.5), (0.6, 0.6, 0.6), 0.0)))


def heat_at(column: int, row: int, side: int = 8) -> torch.Tensor:
    heat = torch.full((side, side), 0.1)
    heat[row, column] = 1.0
    return heat


# --------------------------------------------------------------------------- bars


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("measured", "least", "most", "passed"),
    [
        (0.7, 0.7, 0.95, True),
        (0.95, 0.7, 0.95, True),
        (0.951, 0.7, 0.95, False),
        (0.699, 0.7, None, False),
        (14.9, None, 15.0, True),
        (15.1, None, 15.0, False),
        (math.nan, 0.7, None, False),
        (math.nan, None, 0.7, False),
        (0.0, None, None, None),
    ],
)
def test_a_bar_passes_within_its_limits(
    measured: float, least: float | None, most: float | None, passed: bool | None
) -> None:
    assert Bar("x", measured, least, most).passed is passed


def test_a_share_of_nothing_fails_and_is_valid_json() -> None:
    bar = bars.share("x", [], 0.8)
    assert bar.passed is False and bar.n == 0
    assert json.loads(json.dumps(bar.entry(), allow_nan=False))["measured"] is None


def test_the_worst_category_decides() -> None:
    bar = bars.worst_share("x", {"a": [True] * 10, "b": [True] * 8 + [False] * 2}, 0.9)
    assert (bar.measured, bar.note, bar.passed, bar.n) == (0.8, "b", False, 10)


def test_the_table_names_what_failed() -> None:
    text = bars.table([bars.share("one", [True, False], 0.6), Bar("two", 3.0, most=5.0, unit="ms"), Bar("i", 0.1)])
    head, rule, one, two, info = text.splitlines()
    assert head.startswith("bar") and set(rule) == {"-"}
    assert ">= 60.0%" in one and "50.0%" in one and one.endswith("FAIL")
    assert "<= 5 ms" in two and two.endswith("pass")
    assert "FAIL" not in info and "pass" not in info


class Fixed:
    """Stands in for `Measurements`."""

    counts: dict[str, dict[str, tuple[int, int]]] = {}

    def __init__(self, args: object) -> None:
        self.args = args

    def size(self) -> list[Bar]:
        return [Bar("small", 30.0, most=40.0, unit="MiB")]

    def speed(self) -> list[Bar]:
        return [Bar("slow", 20.0, most=15.0, unit="ms")]


def test_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "Measurements", Fixed)
    common = ["--weights", str(tmp_path), "--json", str(tmp_path / "q.json")]
    assert quality.main(["--only", "size", *common]) == 0
    assert quality.main(["--only", "size,speed", *common]) == 1
    assert "1 bar(s) FAILED: slow" in capsys.readouterr().out
    report = json.loads((tmp_path / "q.json").read_text())
    assert [bar["passed"] for bar in report["bars"]] == [True, False]
    assert {"guidance", "dtype", "versions", "seconds", "counts", "split"} <= report.keys()
    assert report["split"] == "test" and str(tmp_path) not in (tmp_path / "q.json").read_text()


@pytest.mark.parametrize("options", [["--only", "sped"], ["--per-category", "0"], ["--dtype", "int8"]])
def test_a_bad_option_is_named(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        quality.main(options)
    assert options[1] in capsys.readouterr().err


@pytest.mark.parametrize("section", ["autoencoder", "generation"])
def test_missing_weights_are_named(section: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="pipeline"):
        quality.main(["--only", section, "--per-category", "1", "--weights", str(tmp_path)])


def test_a_folder_that_does_not_load_is_named(tmp_path: Path) -> None:
    assert footprint.loading_problem("clip", tmp_path / "clip") == "no folder clip"
    (tmp_path / "reward").mkdir()
    assert footprint.loading_problem("reward", tmp_path / "reward").startswith("reward: FileNotFoundError")


# --------------------------------------------------------------------------- pictures


def test_pick_takes_every_category() -> None:
    rows = pictures.pick(load_split("test"), 2)
    assert [row["category"] for row in rows] == [category for category in CATEGORIES for _ in range(2)]
    assert len(pictures.pick(load_split("test"), None)) == len(load_split("test"))


def test_one_third_of_the_schedule() -> None:
    assert [pictures.early_step(steps) + 1 for steps in (50, 30, 20, 10, 3, 1)] == [17, 10, 7, 3, 1, 1]


def test_a_preview_foreshadows_what_is_coloured_there() -> None:
    final = check_picture(
        draw(("ring", "red", 20, 20, 11), ("star", "blue", 48, 46, 7)), "a red ring and a blue star"
    ).objects
    assert len(final) == 2
    both = pictures.coloured_region(draw(("circle", "green", 22, 21, 9), ("circle", "red", 45, 46, 6)))
    assert pictures.foreshadowed(final, both) == [True, True]
    hollow = pictures.coloured_region(draw(("ring", "red", 20, 20, 11)))  # the hole counts as the ring's
    assert pictures.foreshadowed(final, hollow) == [True, False]
    nothing = pictures.coloured_region(draw())
    assert not nothing.any() and pictures.foreshadowed(final, nothing) == [False, False]


def test_a_region_reaches_a_few_pixels() -> None:
    picture = draw()
    picture[30, 40] = (255, 0, 0)
    region = pictures.coloured_region(picture)
    assert region[30, 43] and region[33, 40] and not region[30, 44] and not region[33, 43]


# --------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a small red circle and a ring", [["small", "red", "circle"], ["ring"]]),
        ("a red star left of an orange star", [["red", "star"], ["orange", "star"]]),
        ("a red star, a blue cross and a pink ring", [["red", "star"], ["blue", "cross"], ["pink", "ring"]]),
        ("four green crosses", [["green", "crosses"]]),
    ],
)
def test_object_token_spans(tokenizer: CLIPTokenizer, caption: str, words: list[list[str]]) -> None:
    ids = tokenizer(caption).input_ids
    spans = attention.object_token_spans(tokenizer, caption)
    assert [[tokenizer.decode(ids[i]).strip() for i in span] for span in spans] == words
    assert len(set(sum(spans, []))) == sum(map(len, words))  # no position twice


def test_the_peak_is_a_cells_middle_even_at_the_border() -> None:
    assert attention.peak(heat_at(3, 5)) == pytest.approx((28.0, 44.0))
    x, y = attention.peak(heat_at(0, 7))
    assert 0 < x < 8 and 56 < y < 64


def test_heat_weighs_every_token_alike() -> None:
    maps = torch.stack([heat_at(1, 1), 1000 * heat_at(6, 6), heat_at(1, 1)])
    heat = attention.object_heat(maps, [0, 1, 2])
    assert float(heat.sum()) == pytest.approx(1.0)
    assert attention.peak(heat) == pytest.approx((12.0, 12.0))  # two of three


@pytest.mark.parametrize(("radius", "inside"), [(6.0, False), (9.0, True)])
def test_peaks_inside(radius: float, inside: bool) -> None:
    found = Found("circle", "red", 12.0, 22.5, radius, 0.9)  # 10.5 pixels from the peak
    assert attention.peaks_inside(heat_at(1, 1), found) is inside


def test_attention_is_read_per_object(tokenizer: CLIPTokenizer) -> None:
    caption = "a red circle left of a blue circle"
    verdict = check_picture(draw(("circle", "blue", 44, 28, 8), ("circle", "red", 12, 28, 8)), caption)
    assert verdict.satisfied
    maps = torch.zeros(32, 8, 8)
    maps[[2, 3]], maps[[7, 8]] = heat_at(1, 3), heat_at(5, 3)
    sample = Sample({"prompt": caption}, verdict, draw(), maps, maps)
    assert attention.attention_outcomes(sample, maps, tokenizer) == [True, True]
    assert attention.attention_outcomes(sample, maps.flip(2), tokenizer) == [False, False]


def test_match_objects_by_their_attributes() -> None:
    red, blue = Found("star", "red", 50, 20, 8, 0.9), Found("star", "blue", 10, 20, 8, 0.9)
    assert match_objects([blue, red], "a red star and a blue star") == [red, blue]
    assert match_objects([blue], "a red cross and a blue star") == [None, blue]
    assert match_objects([red, blue], "three stars").count(None) == 1
