"""``addiff bench``: every comparison runs and is a ratio of what was timed in turns; no figure is judged here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from addiff_env import cli
from addiff_env.cli.bench import COMPARISONS, Figure, Side, in_turns


def test_sides_take_turns_and_the_first_run_does_not_count() -> None:
    told: list[str] = []
    sides = {name: Side(lambda name=name: told.append(name), lambda: told.append("ready")) for name in "ab"}  # type: ignore[misc]
    seconds = in_turns(sides, 3, torch.device("cpu"))
    assert told[1::2] == list("abbaabba") and set(told[::2]) == {"ready"}
    assert all(values.shape == (3,) and (values > 0).all() for values in seconds.values())


def test_a_figure_is_the_median_of_its_rounds() -> None:
    figure = Figure("a", "b / c", [3.0, 1.0, 2.0, 9.0, 2.5])
    assert (figure.median, figure.low, figure.high) == (2.5, 1.0, 9.0)


def test_every_comparison_runs(
    small_kwargs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"{name}={value}" for name, value in small_kwargs.items()]
    options = ["--rounds", "1", "--prompts", "3", "--json", str(tmp_path / "bench.json")]
    assert cli.main(["bench", "num_envs=2", *words, *options]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [name for name in COMPARISONS if name in found["seconds"]] == list(COMPARISONS)
    assert found["lanes"] == 2 and found["machine"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    for figure in found["figures"]:
        assert figure["name"] in shown and len(figure["rounds"]) == 1 and np.isfinite(figure["median"])
    by_name = {figure["name"]: figure["median"] for figure in found["figures"]}
    seconds = found["seconds"]["diffusers"]
    assert by_name["with looks / diffusers"] == pytest.approx(seconds["with looks"][0] / seconds["diffusers"][0])


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--rounds", "0"]) == 1 and "rounds and prompts" in capsys.readouterr().err
    assert cli.main(["bench", "stepz=3"]) == 1 and "stepz" in capsys.readouterr().err
