"""``addiff generate``: what it writes, what it refuses, and that it goes on where it was killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from addiff_env import cli
from addiff_env.agent import Agent, PolicyNet
from addiff_env.env.denoiser import Denoiser
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.pipeline.folder import PictureFolder
from addiff_env.storage.files import claim
from addiff_env.storage.pictures import read_picture

Kwargs = dict[str, Any]


@pytest.fixture(scope="module")
def agent(small_kwargs: Kwargs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with random weights, on the small models."""
    config = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": small_kwargs}, "hidden": 8}
    parts = make_agent_env(Agent(PolicyNet({"x": 1}), config), 1).observer.parts
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PolicyNet(parts, 8)
    folder = tmp_path_factory.mktemp("agent")
    Agent(net, config | {"observation": parts}).save(folder)
    return folder


def words(agent: Path, out: Path, *more: str) -> list[str]:
    return ["generate", *more, "--out", str(out), "--agent", str(agent), "--num-envs", "3"]


def rows_of(out: Path) -> list[Kwargs]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_pictures_have_a_row_each(agent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    asked = ["a red circle", "a star", "--number", "2", "--seed", "5", "--save-previews"]
    assert cli.main(words(agent, out, *asked)) == 0
    rows = rows_of(out)
    assert [(row["index"], row["prompt"], row["seed"]) for row in rows] == [
        (0, "a red circle", 5),
        (1, "a red circle", 6),
        (2, "a star", 7),
        (3, "a star", 8),
    ]
    pipe = AdaptivePipeline.from_pretrained(agent, num_envs=1)
    expected = pipe(["a red circle", "a star"], seeds=[5, 7], num_images_per_prompt=2)
    for row, image, nfe in zip(rows, expected.images, expected.nfe, strict=True):
        assert row["nfe"] == nfe and row["error"] == "" and len(row["previews"]) == len(row["actions"])
        made = read_picture(out / row["image"]).astype(int)
        assert np.abs(made - np.asarray(image)).max() <= 1
        assert all(read_picture(out / name).shape == (64, 64, 3) for name in row["previews"])
    assert "4 of 4 pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "a star\n\na ring\n"),
        ("a.csv", "prompt,seed,negative_prompt\na star,7,a ring\na ring,,\n"),
        ("a.jsonl", '{"prompt": "a star", "seed": 7, "negative_prompt": "a ring"}\n"a ring"\n'),
    ],
)
def test_files_of_prompts(agent: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert cli.main(words(agent, tmp_path / "out", "--prompts", str(tmp_path / name), "--negative-prompt", "b")) == 0
    rows = rows_of(tmp_path / "out")
    stated = name != "a.txt"
    assert [(row["prompt"], row["seed"], row["negative_prompt"]) for row in rows] == [
        ("a star", 7 if stated else 0, "a ring" if stated else "b"),
        ("a ring", 1, "b"),
    ]


BAD = ["7", "null", "[]", "{}", '{"prompt": 7}', '{"prompt": "a", "seed": "x"}', "{torn", '{"prompt": "a\\u0000"}']
BAD += ['{"prompt": " "}', '{"prompt": "a", "seed": -1}', '{"prompt": "a", "negative_prompt": 7}', '"\\ud800"']


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(['"a star"', '{"prompt": "a ring"}', *BAD]), min_size=1, max_size=6), st.integers(1, 2))
def test_what_is_no_prompt_fails_alone(
    agent: Path, tmp_path_factory: pytest.TempPathFactory, lines: list[str], number: int
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    command = words(agent, folder / "out", "--prompts", str(folder / "a.jsonl"), "--number", str(number))
    bad = [line in BAD for line in lines for _ in range(number)]
    for _ in range(2):  # the second time there is nothing left to do, and it is said again
        assert cli.main(command) == (3 if any(bad) else 0)
        rows = rows_of(folder / "out")
        assert [row["index"] for row in rows] == list(range(len(bad))) and [bool(row["error"]) for row in rows] == bad
        for row in rows:
            place = f"a.jsonl:{row['index'] // number + 1}"
            assert place in row["error"] if row["error"] else (row["seed"], row["nfe"] > 0) == (row["index"], True)


def test_numbers_that_are_not_finite_fail_alone(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = Denoiser.evaluate

    def broken(self: Denoiser, state: Any, lanes: np.ndarray, *args: Any, **kwargs: Any) -> None:
        evaluate(self, state, lanes, *args, **kwargs)
        state.nonfinite[[lane for lane in lanes if state.seed[lane] == 2]] = True

    monkeypatch.setattr(Denoiser, "evaluate", broken)
    assert cli.main(words(agent, tmp_path / "out", "a star", "--number", "5")) == 3
    rows = rows_of(tmp_path / "out")
    assert [bool(row["error"]) for row in rows] == [False, False, True, False, False] and "finite" in rows[2]["error"]
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
    assert "failed: picture 2, 'a star'" in capsys.readouterr().err


def test_a_run_that_was_stopped_goes_on(agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, keep, kept = tmp_path / "out", PictureFolder.keep, []

    class Killed(BaseException):
        pass

    def counted(self: PictureFolder, task: Any, made: Any) -> None:
        if len(kept) in (2, 5):
            kept.append(-1)
            raise Killed
        kept.append(task.index)
        keep(self, task, made)

    monkeypatch.setattr(PictureFolder, "keep", counted)
    command = words(agent, out, "a star", "--number", "6")
    for _ in range(2):
        with pytest.raises(Killed):
            cli.main(command)
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"index": 5, "torn')
    (out / "images" / "000004.png").unlink(missing_ok=True)  # whatever has no picture is made again
    assert cli.main(command) == 0
    assert sorted(index for index in kept if index >= 0) == [0, 1, 2, 3, 4, 5] and len(rows_of(out)) == 6
    (out / rows_of(out)[3]["image"]).unlink()
    assert cli.main(command) == 0 and kept[-1] == 3 and len(rows_of(out)) == 6


@pytest.mark.parametrize(
    ("changed", "words_of_it"),
    [
        (["a ring"], "prompts"),
        (["a star", "--seed", "1"], "seed: 0 there, 1 now"),
        (["a star", "--number", "2"], "number: 1 there, 2 now"),
        (["a star", "--negative-prompt", "b"], "negative_prompt"),
        (["a star", "--max-nfe", "7"], "max_nfe"),
        (["a star", "--height", "32"], "environment.height: 64 there, 32 now"),
        (["a star", "--save-previews"], "save_previews"),
        (["a star", "--dtype", "bfloat16"], "dtype"),
    ],
)
def test_other_inputs_are_refused_by_name(
    agent: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changed: list[str],
    words_of_it: str,
) -> None:
    assert cli.main(words(agent, tmp_path / "out", "a star")) == 0
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(AdaptivePipeline, "from_pretrained", None)  # before any model is loaded
    assert cli.main(words(agent, tmp_path / "out", *changed)) == 1
    said = capsys.readouterr().err
    assert words_of_it in said and "--out" in said and (tmp_path / "out" / "rows.jsonl").read_bytes() == before


def test_bad_settings_leave_nothing_to_agree_with(
    agent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, said in (
        (["--max-nfe", "2"], "max_nfe 2"),
        (["--price", "0.1"], "no price input"),
        (["--target-nfe", "9"], "no price input"),
        (["--env", "Nothing-v0"], "'Nothing-v0' is no registered environment"),
        (["--height", "63"], "height"),
    ):
        assert cli.main(words(agent, tmp_path / "out", "a star", *more)) == 1
        assert said in capsys.readouterr().err
    assert cli.main(words(agent, tmp_path / "out", "--prompts", str(tmp_path / "none.txt"))) == 1
    with claim(tmp_path / "out", "somebody else"):
        assert cli.main(words(agent, tmp_path / "out", "a star")) == 1
    assert "somebody else" in capsys.readouterr().err
    assert cli.main(words(agent, tmp_path / "out", "a star")) == 0
    for wrong in (["a", "--number", "0"], ["a", "--seed", "-1"], [], ["a", "--prompts", "b.txt"]):
        with pytest.raises(SystemExit):
            cli.main(words(agent, tmp_path / "other", *wrong))


def test_processes_take_their_shares_and_any_of_them_merges(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, monkey = tmp_path / "out", monkeypatch
    command = words(agent, out, "a star", "--number", "5")
    monkey.setenv("WORLD_SIZE", "2")
    monkey.setenv("RANK", "1")
    assert cli.main(command) == 0
    assert [row["index"] for row in rows_of(out)] == [1, 3] and "the others add 3" in capsys.readouterr().out
    monkey.setenv("RANK", "0")
    assert cli.main(command) == 0
    merged = rows_of(out)
    assert [row["index"] for row in merged] == [0, 1, 2, 3, 4]
    monkey.delenv("WORLD_SIZE")
    assert cli.main(command) == 0 and rows_of(out) == merged  # one process finds nothing left to do


@pytest.mark.slow
def test_kills_lose_nothing_and_nothing_is_made_twice(agent: Path, tmp_path: Path) -> None:
    """A thousand pictures, with kill -9 twice in between."""
    (tmp_path / "a.txt").write_text("a star\n" * 1000)
    out = tmp_path / "out"
    command = words(agent, out, "--prompts", str(tmp_path / "a.txt"))
    run = [sys.executable, "-m", "addiff_env.cli", *command]
    for wanted in (200, 600):
        with subprocess.Popen(run) as process:
            deadline = time.monotonic() + 900
            while not (out / "rows.jsonl").exists() or (out / "rows.jsonl").read_bytes().count(b"\n") < wanted:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
        made = {path.name: path.stat().st_mtime_ns for path in (out / "images").glob("*.png")}
        kept = {json.loads(line)["image"] for line in (out / "rows.jsonl").read_text().rpartition("\n")[0].splitlines()}
    assert subprocess.run(run).returncode == 0
    assert [row["index"] for row in rows_of(out)] == list(range(1000))
    assert len(list((out / "images").glob("*.png"))) == 1000 and not list(out.rglob("*.partial.png"))
    for image in kept:  # what had a row was not made again
        assert (out / image).stat().st_mtime_ns == made[Path(image).name]
