"""``addiff bench``: every comparison runs and is a ratio of what was timed in turns; no figure is judged here."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from addiff_env import cli
from addiff_env.cli import bench
from addiff_env.cli.bench import COMPARISONS, memory, pictures, quality, rounds
from addiff_env.cli.bench.rounds import Figure, Rounds, Side, table
from addiff_env.cli.bench.subject import StaggeredAgent, Subject
from addiff_env.cli.chosen import read_chosen
from addiff_env.evaluation.statistics.front import front_quality
from addiff_env.types import Action, Generated

CPU = torch.device("cpu")
MEASURED = tuple(name for name in COMPARISONS if name != "quality")


def words(kwargs: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in kwargs.items()]


class FakeClock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(rounds.time, "perf_counter", lambda: self.now)

    def takes(self, *seconds: float) -> Callable[[], None]:
        """Something that takes so long, the last number from then on."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


# ------------------------------------------------------------------ rounds


def test_sides_take_turns_and_the_first_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    clock = FakeClock(monkeypatch)
    takes = {"a": clock.takes(1, 2, 3), "b": clock.takes(4)}

    def side(name: str) -> Side:
        def run() -> None:
            told.append(name)
            takes[name]()

        def prepare() -> None:
            told.append("ready")
            clock.now += 1000

        return Side(run, prepare, first=lambda: told.append(f"first {name}"))

    seconds = Rounds(3, CPU).in_turns("it", {name: side(name) for name in "ab"})
    assert told[1::2] == ["first a", "first b", *"abbaab"] and set(told[::2]) == {"ready"}
    assert {name: values.tolist() for name, values in seconds.items()} == {"a": [1, 2, 3], "b": [4, 4, 4]}


@pytest.mark.parametrize("runs", range(12))
def test_whole_rounds_count_when_it_is_interrupted(runs: int) -> None:
    """Two runs make a round, of which the first does not count: after four runs there is something to show."""
    made: list[None] = []

    def run() -> None:
        if len(made) == runs:
            raise KeyboardInterrupt
        made.append(None)

    timer = Rounds(4, CPU)
    sides = {"a": Side(run), "b": Side(run)}
    if runs < 4:
        with pytest.raises(KeyboardInterrupt):
            timer.in_turns("it", sides)
    else:
        found = timer.in_turns("it", sides)
        assert [len(values) for values in found.values()] == [min(4, runs // 2 - 1)] * 2
    assert timer.interrupted == (runs < 10)
    if timer.interrupted:
        with pytest.raises(KeyboardInterrupt):  # nothing more is timed
            timer.in_turns("more", {"a": Side(lambda: None)})


def test_a_figure_is_the_median_of_its_rounds() -> None:
    figure = Figure("a", "b / c", [3.0, 1.0, 2.0, 9.0, 2.5])
    assert (figure.median, figure.low, figure.high) == (2.5, 1.0, 9.0)
    line = table([figure, Figure("a", "d", [7.0], "MiB")]).splitlines()
    assert "2.500" in line[1] and "[1.000, 9.000]" in line[1]
    assert line[2].endswith("7.000 MiB")


# ------------------------------------------------------------------ memory


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="the system does not tell a process's peak")
def test_peak_memory_is_what_a_run_takes_beyond_what_was_there() -> None:
    mib = 2**20

    def take(size: int) -> int:
        found = memory.peak_of(lambda: np.ones(size * mib, np.uint8), CPU)
        assert found is not None
        return found

    assert 195 * mib < take(200) < 230 * mib
    assert 45 * mib < take(50) < 80 * mib  # though the process had more before


def test_where_a_system_tells_no_peak_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "no" / "clear_refs")
    assert memory.peak_of(lambda: None, CPU) is None


# ------------------------------------------------------------------ continuous batching


@pytest.fixture
def subject(small_kwargs: dict[str, Any]) -> Subject:
    return Subject(read_chosen(["num_envs=2", *words(small_kwargs)]), rounds=1, prompts=5)


def test_an_agent_that_stops_by_turns_spreads_the_ends(subject: Subject) -> None:
    agent = subject.agent
    assert isinstance(agent, StaggeredAgent)
    made = [Generated("", seed, np.zeros(0, np.uint8), actions=[0] * 2) for seed in range(40)]
    observations = np.zeros((40, sum(subject.looking.parts.values())), np.float32)
    actions = agent.act_in(observations, None, made)
    assert set(actions.tolist()) == {Action.CONTINUE, Action.STOP}
    np.testing.assert_array_equal(agent.act_in(observations[:7], None, made[:7]), actions[:7])


def test_the_ideal_is_full_batches_of_as_many_evaluations(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: an evaluation takes 1 s with looks and .8 s without, however many lanes it has.

    Pictures of 6, 2, 6, 2 and 6 evaluations on two lanes, of six steps: in batches 6 + 6 + 6 s; in turns as below.
    """
    clock, env = FakeClock(monkeypatch), subject.acting
    stops = {0: 6, 1: 2, 2: 6, 3: 2, 4: 6}
    monkeypatch.setattr(type(subject.agent), "act_in", lambda self, obs, mask, made: _until(made, stops), raising=True)
    costs = {id(env.denoiser): 1.0, id(subject.blind.denoiser): 0.8}
    evaluate = type(env.denoiser).evaluate

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        clock.now += costs[id(self)]
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(type(env.denoiser), "evaluate", timed)
    found = {figure.name: figure.median for figure in pictures.batching(subject)}
    # One lane has 0 in steps 1 to 6 and 3 in 7 to 9, the other 1 in 1 to 3 and 2 in 4 to 9: a lane that stops has its
    # place until the others have made that step. Then 4 alone, in 10 to 15.
    assert subject.seconds["batching"]["continuous"] == pytest.approx([15])
    assert subject.seconds["batching"]["fixed batches"] == pytest.approx([18])
    assert found["fixed batches / continuous"] == pytest.approx(18 / 15)
    assert found["of a picture"] == pytest.approx(22 / 5)
    assert found["share of the ideal, with looks"] == pytest.approx(22 / 2 * 1.0 / 15)
    assert found["share of the ideal, without looks"] == pytest.approx(22 / 2 * 0.8 / 15)


def _until(made: list[Generated], evaluations: dict[int, int]) -> np.ndarray:
    """Stop after so many evaluations of each seed; two were the warm-up's."""
    ends = [len(one.actions) + 2 >= evaluations[one.seed] for one in made]
    return np.where(ends, int(Action.STOP), int(Action.CONTINUE))


# ------------------------------------------------------------------ scaling


def test_a_size_is_compared_with_the_baselines_around_it(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down, each run by a second, leaves the ratio what it is."""
    clock, slower = FakeClock(monkeypatch), [0]
    sizes: list[tuple[int, int]] = []

    class Pipeline:
        def __init__(self, env: int, agent: Any) -> None:
            self.lanes = env

        def set_progress_bar_config(self, **_: Any) -> None: ...

        def stream(self, texts: list[str], seeds: list[int], price: float | None) -> list[Any]:
            sizes.append((self.lanes, len(texts)))
            slower[0] += 1
            clock.now += len(texts) * (10.0 + slower[0])
            return []

    monkeypatch.setattr(pictures, "AdaptivePipeline", Pipeline)
    monkeypatch.setattr(subject, "acting_env", lambda lanes: lanes)
    monkeypatch.setattr(pictures, "peak_of", lambda run, device: run() or 3 * 2**20)
    found = {figure.name: figure for figure in pictures.scaling(subject, lanes=[4], prompts=[128])}
    assert {name: figure.unit for name, figure in found.items()} == {
        "4 lanes / baseline, a picture": "",
        "4 lanes": "s a picture",
        "4 lanes, at most": "MiB",
        "128 prompts / baseline, a picture": "",
        "128 prompts": "s a picture",
        "128 prompts, at most": "MiB",
    }
    for name in ("4 lanes", "128 prompts"):
        assert found[f"{name} / baseline, a picture"].median == pytest.approx(1)
        assert found[f"{name}, at most"].median == 3
    assert set(sizes) == {(16, 16), (4, 4), (16, 64), (4, 64), (16, 128)}  # the first ones are not counted


# ------------------------------------------------------------------ equal quality


def test_seconds_at_a_quality_are_those_of_the_front() -> None:
    points = [(np.array([1.0, 2.0]), 0.2), (np.array([3.0, 5.0]), 0.6), (np.array([9.0, 9.0]), 0.7)]
    np.testing.assert_allclose(quality.seconds_at(0.4, points), [2.0, 3.5])
    np.testing.assert_allclose(quality.seconds_at(0.1, points), [1.0, 2.0])  # the cheapest is better than asked for
    np.testing.assert_allclose(quality.seconds_at(0.6, points), [3.0, 5.0])
    costs, of = np.array([[seconds[0] for seconds, _ in points]]), np.array([[of for _, of in points]])
    for wanted in (0.25, 0.4, 0.65):
        at = quality.seconds_at(wanted, points)[:1]
        np.testing.assert_allclose(front_quality(costs, of, at), [wanted])
    with pytest.raises(ValueError, match="0.8"):
        quality.seconds_at(0.8, points)


def test_families_are_compared_at_the_highest_quality_that_both_reach() -> None:
    agent, solvers = [(np.array([2.0]), 0.9)], [(np.array([1.0]), 0.5), (np.array([3.0]), 0.7)]
    figure = quality.as_good("solvers", solvers, agent)
    assert figure.name == "agent / solvers, both at 0.700" and figure.median == pytest.approx(1.5)
    better = quality.as_good("search", [(np.array([8.0]), 0.95), (np.array([4.0]), 0.85)], agent)
    assert better.median == pytest.approx((4 + 0.5 * 4) / 2) and "0.900" in better.name


def test_an_evaluations_methods_form_families() -> None:
    names = [
        "agent@0.004",
        "agent@0.001",
        "ddim-5",
        "unipc-10",
        "best-of-2:ddim-5",
        "threshold:5:0",
        "agent, continued",
    ]
    assert quality.families_of(names) == {
        "solvers": ("ddim-5", "unipc-10"),
        "best-of-N": ("best-of-2:ddim-5",),
        "rule": ("threshold:5:0",),
        "agent": ("agent@0.004", "agent@0.001"),
    }
    for missing in (["ddim-5"], ["agent"]):
        with pytest.raises(ValueError, match=missing[0]):
            quality.families_of(missing)


class FakeMethod:
    """Takes ``seconds`` a picture, of which the first ``good`` are good."""

    solver = policy = "none"
    backbone = SimpleNamespace(device=CPU, name="none", revision=None, dtype_name="float32")

    def __init__(self, name: str, clock: FakeClock, seconds: float, good: int) -> None:
        self.name, self.clock, self.seconds, self.good = name, clock, seconds, good

    def make(self, items: list[Any]) -> Any:
        for index, item in enumerate(items):
            self.clock.now += self.seconds
            picture = np.full(1, index < self.good, np.uint8)
            yield [(item, Generated(item.prompt, item.seed, picture, nfe=5, net_flops=1.0))]


def test_pictures_that_are_judged_are_those_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    made = {"ddim-5": (1, 4), "ddim-10": (2, 6), "best-of-2:ddim-5": (4, 8), "threshold:5:0": (1, 8), "agent": (2, 8)}
    monkeypatch.setattr(
        quality,
        "FAMILIES",
        {"solvers": ("ddim-5", "ddim-10"), "best": ("best-of-2:ddim-5",), "rule": ("threshold:5:0",)},
    )
    monkeypatch.setattr(quality, "_method", lambda spec, *_: FakeMethod(spec, clock, *made[spec]))
    monkeypatch.setattr(quality, "_forget", lambda subject: None)
    monkeypatch.setattr(
        quality, "check_picture", lambda picture, prompt: SimpleNamespace(satisfied=bool(picture.all()))
    )
    own = partial(quality.time_methods, clock=lambda: clock.now)
    monkeypatch.setattr(quality, "time_methods", own)
    agent = SimpleNamespace(price_range=None)
    subject: Any = SimpleNamespace(
        trained=agent, agent=agent, lanes=2, rounds=Rounds(2, CPU), acting_env=lambda lanes, batch_size: None
    )
    found = {figure.name: figure for figure in quality.equal_quality(subject, 8)}
    for name, (seconds, good) in made.items():
        assert found[f"{name}, quality"].median == good / 8
        assert found[name].rounds == [1 / seconds] * 2 and found[name].unit == "pictures/s"
    assert found["agent / solvers, both at 0.750"].median == pytest.approx(1)
    assert found["agent / best, both at 1.000"].median == pytest.approx(2)
    assert found["agent / rule, both at 1.000"].median == pytest.approx(0.5)


# ------------------------------------------------------------------ the command


def test_every_comparison_runs(
    small_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "BASE_LANES", 2)
    monkeypatch.setattr(pictures, "BASE_PROMPTS", 3)
    options = ["--rounds", "1", "--prompts", "3", "--scaling-lanes", "2", "--scaling-prompts", "3"]
    options += ["--variant", "num_inference_steps=4 max_nfe=8", "--json", str(tmp_path / "bench.json")]
    assert cli.main(["bench", "num_envs=2", *words(small_kwargs), *options]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["machine"]["torch"] == torch.__version__ and len(found["runs"]) == 2
    assert [run["settings"]["num_inference_steps"] for run in found["runs"]] == [6, 4]
    shown = capsys.readouterr().out
    for run in found["runs"]:
        assert [name for name in MEASURED if name in run["seconds"]] == list(MEASURED)
        assert (run["lanes"], run["dtype"], run["failed"]) == (2, "float32", {})
        for figure in run["figures"]:
            assert figure["name"] in shown and len(figure["rounds"]) == 1 and np.isfinite(figure["median"])
        by_name = {figure["name"]: figure["median"] for figure in run["figures"]}
        seconds = run["seconds"]["diffusers"]
        assert by_name["with looks / diffusers"] == pytest.approx(seconds["with looks"][0] / seconds["diffusers"][0])


def test_what_was_measured_is_kept_when_a_comparison_fails_or_is_interrupted(
    small_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(subject: Subject) -> Any:
        yield Figure("first", "of a half", [1.5])
        raise RuntimeError("out of memory")

    def stopped(subject: Subject) -> Any:
        yield Figure("second", "of another half", [2.5])
        raise KeyboardInterrupt

    offered = {"diffusers": out_of_memory, "mixed": stopped, "batched": out_of_memory}
    monkeypatch.setattr(bench, "comparisons", lambda options: offered)
    command = ["bench", *words(small_kwargs), "--json", str(tmp_path / "b.json"), "--only"]
    assert cli.main([*command, "diffusers"]) == 1
    assert "failed: RuntimeError: out of memory" in capsys.readouterr().out
    assert cli.main([*command, "diffusers", "mixed", "batched"]) == 130
    (run,) = json.loads((tmp_path / "b.json").read_text())["runs"]
    assert [figure["median"] for figure in run["figures"]] == [1.5, 2.5] and list(run["failed"]) == ["diffusers"]
    assert "2.500" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "place"), [("--run", "no/such/run"), ("--json", "no/such/folder/b.json")])
def test_a_place_that_is_not_there_is_named_before_anything_is_measured(
    option: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "Subject", lambda *given: pytest.fail("loaded"))
    assert cli.main(["bench", option, str(tmp_path / place)]) == 1
    assert place in capsys.readouterr().err


def test_a_trainings_lanes_are_not_taken_over() -> None:
    (few,), (named,) = (bench.chosen_variants(given, []) for given in (["env=tiny"], ["env=tiny", "num_envs=64"]))
    assert (few.num_envs, named.num_envs) == (16, 64)
    variants = bench.chosen_variants(["env=sdxl", "device=cpu"], ["height=512 width=512", "compile=true"])
    assert [one.config.height for one in variants] == [1024, 512, 1024]
    assert [one.config.compile for one in variants] == [False, False, True] and variants[0].num_envs == 4


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--rounds", "0"])
    assert "rounds" in capsys.readouterr().err
    assert cli.main(["bench", "stepz=3"]) == 1 and "stepz" in capsys.readouterr().err
    assert cli.main(["bench", "--agent", "no/such"]) == 1 and "no/such" in capsys.readouterr().err
