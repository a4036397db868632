"""What refinements repair: measured as the environment itself would refine, kept, and gone on with."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from addiff_env import cli
from addiff_env.storage.jsonl import read_objects
from addiff_env.tiny.checker import check_picture
from addiff_env.tiny.measures import repair
from addiff_env.tiny.recipes.endings import FreeLanes
from addiff_env.types import Action

SMALL = {"num_inference_steps": 4, "warmup_steps": 1}
WORDS = ["--number", "2", "--categories", "four_objects", "--num-envs", "1"]
WORDS += ["--set", *(f"{name}={value}" for name, value in SMALL.items())]


def by_environment(rows: list[dict], mask: str, renoise: float) -> tuple[list[bool], list[bool]]:
    """Satisfied or not, stopped before the last step as it stands and refined there."""
    settings = SMALL | {"mask": mask, "renoise": renoise, "observe_every": 1000}
    env = gym.make_vec("AdDiffusion-Tiny-v0", len(rows), autoreset_mode=AutoresetMode.DISABLED, **settings).unwrapped

    def go_on() -> None:
        while env.step_index[0] < 3:
            env.step(np.full(len(rows), Action.CONTINUE))

    verdicts = []
    for refined in (False, True):
        env.reset(options={"prompt": [r["prompt"] for r in rows], "seed": [r["seed"] for r in rows]})
        go_on()
        if refined:
            env.step(np.full(len(rows), Action.REFINE))
            go_on()
        if not env.done.all():  # a refinement late in the schedule may end it
            env.step(np.full(len(rows), Action.STOP))
        verdicts.append([check_picture(env.final_image(k), row["prompt"]).satisfied for k, row in enumerate(rows)])
    return verdicts[0], verdicts[1]


@pytest.fixture(scope="module")
def lanes() -> FreeLanes:
    args = repair.options(WORDS)
    return FreeLanes(repair.configured(args), 3)


def test_lanes_are_refined_as_the_environment_refines_them(lanes: FreeLanes) -> None:
    rows = repair.pictures(["single_object"], 3, 1)
    found = list(repair.outcomes(lanes, rows, 3, ["random", repair.NOTHING], [0.85, 0.5]))
    assert [(o["mask"], o["renoise"]) for o in found[::3]] == [
        ("random", 0.85), (repair.NOTHING, 0.85), ("random", 0.5), (repair.NOTHING, 0.5)
    ]  # fmt: skip
    for renoise in (0.85, 0.5):
        own = [o for o in found if o["mask"] == "random" and o["renoise"] == renoise]
        assert ([o["before"] for o in own], [o["after"] for o in own]) == by_environment(rows, "random", renoise)
        assert all(0.3 < o["renewed"] < 0.7 for o in own)
    assert all(o["renewed"] == 0 for o in found if o["mask"] == repair.NOTHING)


def test_fewer_rows_than_lanes(lanes: FreeLanes) -> None:
    rows = repair.pictures(["single_object"], 2, 1)
    found = list(repair.outcomes(lanes, rows, 3, ["full"], [0.85]))
    assert [(o["prompt"], o["seed"]) for o in found] == [(row["prompt"], row["seed"]) for row in rows]


def test_what_was_measured_is_kept_and_not_made_again(tmp_path, monkeypatch, capsys) -> None:
    record, made = tmp_path / "a record.jsonl", []
    own = repair.outcomes

    def outcomes(lanes, rows, refined_at, masks, renoise):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append((rows[0]["prompt"], tuple(masks)))
        return own(lanes, rows, refined_at, masks, renoise)

    monkeypatch.setattr(repair, "outcomes", outcomes)
    words = ["world", "repair", *WORDS, "--record", str(record), "--masks", "full"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 130 and str(record) in capsys.readouterr().err
    first = made.copy()
    made.append(())  # no further interruption
    assert cli.main(words) == 0 and len(made) == 3 and made[2] != first[0]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["mask", "full"]
    kept = record.read_bytes()
    assert cli.main(words) == 0 and len(made) == 3 and record.read_bytes() == kept
    assert cli.main([*words, "nothing"]) == 0  # another mask
    assert [masks for _, masks in made[3:]] == [("nothing",), ("nothing",)]
    assert len(read_objects(record)) == 1 + 4
    capsys.readouterr()
    assert cli.main([*words, "--refined-at", "2"]) == 1
    assert "name another file" in capsys.readouterr().err


def test_the_tables_by_hand(tmp_path) -> None:
    rows = [{"prompt": prompt, "seed": seed} for seed in (0, 1) for prompt in ("a", "b", "c", "d")]
    before = [False, False, False, True, False, False, True, True]
    after = {"full": [True, False, False, True, True, False, False, True], "grid": [True] * 8}
    record = repair.Record(tmp_path / "record.jsonl", {})
    record.keep(
        [
            row | {"mask": mask, "renoise": 0.85, "before": b, "after": a, "renewed": 0.5}
            for mask, values in after.items()
            for row, b, a in zip(rows, before, values, strict=True)
        ]
    )
    args = repair.options(["--masks", "full", "grid"])
    full, grid = (line.split() for line in repair.table(args, rows, record)[1:])
    assert full[:4] == ["full", "0.85", "5", "0.400"] and full[5] == "0.667" and full[7] == "0.500"
    assert grid[3] == grid[5] == grid[7] == "1.000" and grid[-1] == "0.50"
    head, line = repair.differences(args, rows, record)
    # Of the failed, a is repaired by both twice, b and c (once) by grid alone: deviations -1.2, .8, .4 by prompt.
    half = 1.959964 * (2.24 * 3 / 2) ** 0.5 / 5
    assert line.split()[:3] == ["grid", "0.85", "+0.600"] and f"({0.6 - half:+.2f} to {0.6 + half:+.2f})" in line
    assert repair.differences(repair.options(["--masks", "grid"]), rows, record) == []


def test_several_seeds_of_a_prompt() -> None:
    rows = repair.pictures(["three_objects", "four_objects"], 256, 2)
    assert len({(row["prompt"], row["seed"]) for row in rows}) == 512
    assert {row["category"] for row in rows} == {"three_objects", "four_objects"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--refined-at", "4"], "refined-at must be at most 3, the last decision, got 4"),
        (["--renoise", "1.5"], "renoise must be a share"),
        (["--set", "maskk=1"], "maskk"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(wrong, words, capsys) -> None:
    assert cli.main(["world", "repair", *WORDS, *wrong]) == 1
    assert words in capsys.readouterr().err
