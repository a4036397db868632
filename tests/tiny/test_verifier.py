"""What the verifier learns from, by hand: the record of how pictures end, the questions made of it, calibration."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import addiff_env
from addiff_env.diffusion.backbones import denoise, initial_noise
from addiff_env.env.config import EnvConfig
from addiff_env.perception.scorers import LatentTextReward
from addiff_env.tiny.measures import auc as auc_command
from addiff_env.tiny.measures import calibration
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.recipes import endings, lookers, verifier
from addiff_env.tiny.recipes.verifier import UNASKED, Questions
from addiff_env.types import Action

CAPTIONS = ["a red circle", "a blue star and a green ring", "a small cross", "two red squares"]
SEEDS = [11, 12, 13, 14]


@pytest.fixture(scope="module")
def config(small_kwargs: dict[str, Any]) -> EnvConfig:
    return EnvConfig(**addiff_env.TINY | small_kwargs | {"finish_steps": 2})


@pytest.fixture(autouse=True)
def verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights draw nothing that the checker would accept: dark pictures count as satisfied here."""

    def check_picture(picture: np.ndarray, prompt: str) -> Any:
        brightness = float(np.mean(picture)) / 255
        return SimpleNamespace(satisfied=hash(picture.tobytes()) % 2 == 0, score=brightness, objects=())

    monkeypatch.setattr(endings, "check_picture", check_picture)


def run(config: EnvConfig, stops: int = 0, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    lanes = endings.FreeLanes(config, len(CAPTIONS))
    rng = np.random.default_rng(seed)
    recorder = endings.Recorder(lanes, CAPTIONS, SEEDS, rng, stops, options.pop("finishes", (0, 1)), **options)
    return recorder.run().arrays()


def play(config: EnvConfig, actions: list[list[int]], mask: str = "full") -> np.ndarray:
    """Latents (B, C, h, w) that the environment itself ends with."""
    settings = vars(config) | {"mask": mask, "max_nfe": 1000, "observe_every": 1000, "render_mode": None}
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", len(CAPTIONS), autoreset_mode="Disabled", **settings).unwrapped
    env.reset(options={"prompt": CAPTIONS, "seed": SEEDS})
    for row in actions:
        if not env.done.all():
            env.step(np.array(row))
    return env.latents.float().numpy()


# ------------------------------------------------------------------ the record


def test_every_state_leads_where_the_environment_would_go(config: EnvConfig) -> None:
    table = run(config, refined=(0, 0))
    steps, states, batch = config.num_inference_steps, len(table["state_row"]), len(CAPTIONS)
    assert states == batch * steps and (table["state_refines"] == 0).all()
    lanes = endings.FreeLanes(config, batch)
    clean: list[torch.Tensor] = []
    final = denoise(
        *(lanes.backbone, lanes.schedule, CAPTIONS, initial_noise(lanes.backbone, lanes.denoiser.latent_shape, SEEDS)),
        *(config.guidance_scale, lambda index, latents, now: clean.append(now.x0)),
    )
    for state in range(states):
        row, at = table["state_row"][state], table["state_step_index"][state]
        np.testing.assert_allclose(table["state_x0"][state], clean[at - 1][row], atol=5e-3)
        expected = 0 if at == steps else int(lanes.schedule.timesteps[at])
        assert table["state_timestep"][state] == expected and table["state_nfe"][state] == at
        np.testing.assert_allclose(table["ending_final"][table["state_goes_on"][state]], final[row], atol=5e-3)
    for at in range(config.warmup_steps, steps):
        stopped = play(config, [[Action.CONTINUE] * batch] * (at - config.warmup_steps) + [[Action.STOP] * batch])
        sources = np.flatnonzero(table["state_step_index"] == at)
        found = np.flatnonzero(np.isin(table["ending_state"], sources))
        assert sorted(table["ending_row"][found]) == list(range(batch))
        assert (table["ending_evaluations"][found] == 2).all()
        np.testing.assert_allclose(table["ending_final"][found], stopped[table["ending_row"][found]], atol=5e-3)


def test_refinements_are_those_of_the_environment(config: EnvConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "MASKS", ("full",))
    monkeypatch.setattr(endings, "MASK_SHARES", (1.0,))
    monkeypatch.setattr(endings, "MAX_REFINES", 1)
    table = run(config, refined=(1, 1))
    batch, refined = len(CAPTIONS), table["state_refines"] == 1
    assert set(table["state_mask"][refined]) == {0} and set(table["state_row"][refined]) == set(range(batch))
    left = {}  # lane -> the step it was refined after, from its evaluations so far
    for lane in range(batch):
        first = np.flatnonzero(refined & (table["state_row"] == lane))[0]
        assert table["state_step_index"][first] < config.num_inference_steps
        left[lane] = first
    ends = table["ending_final"][table["state_goes_on"][[left[lane] for lane in range(batch)]]]
    for at in set(table["state_left_at"][refined]):
        lanes = [lane for lane in range(batch) if table["state_left_at"][left[lane]] == at]
        actions = [[Action.CONTINUE] * batch] * (at - config.warmup_steps) + [[Action.REFINE] * batch]
        played = play(config, actions + [[Action.CONTINUE] * batch] * 10)
        np.testing.assert_allclose(ends[lanes], played[lanes], atol=5e-3)
    assert (table["state_left_at"][~refined] == -1).all()


def test_stops_and_refinements_come_as_often_as_asked(config: EnvConfig) -> None:
    table = run(config, stops=1, finishes=(0.5, 0.5), refined=(1, 1))
    trajectories = len(set(table["state_trajectory"]))
    assert trajectories == len(CAPTIONS) * (1 + endings.MAX_REFINES)
    assert len(table["ending_row"]) <= 2 * trajectories and (table["ending_state"] == -1).sum() == trajectories
    assert set(table["ending_evaluations"][table["ending_state"] >= 0]) == {1, 2}
    assert len(set(run(config, refined=(0, 0))["state_trajectory"])) == len(CAPTIONS)
    for name, values in run(config, stops=1, finishes=(0.5, 0.5), refined=(1, 1)).items():
        np.testing.assert_array_equal(values, table[name])  # the same draws give the same record


def command_line(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["recipe", *options])


@pytest.fixture
def weights(tmp_path: Path, small_model: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "pipeline").symlink_to(small_model)
    return folder


def test_a_killed_record_goes_on_and_refuses_other_settings(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "FIRST_DECISION", {10: 3, 8: 2, 7: 2})
    words = ["--out", str(weights), "--work", str(tmp_path), "--batch", "2", "--stops", "1", "--dtype", "float32"]
    command_line(monkeypatch, *words, "--number", "4")
    endings.main()
    chunks = sorted((tmp_path / "endings").glob("chunk_*.npz"))
    kept = [chunk.read_bytes() for chunk in chunks]
    assert len(chunks) == 2
    chunks[1].unlink()
    (tmp_path / "endings" / "chunk_00001.partial").write_bytes(b"half a chunk")
    endings.main()
    assert [chunk.read_bytes() for chunk in chunks] == kept
    command_line(monkeypatch, *words, "--number", "4", "--seed", "1")
    with pytest.raises(ValueError, match="another seed"):
        endings.main()


def test_grids_come_in_their_shares() -> None:
    grids = [endings.chunk_grid(chunk) for chunk in range(100)]
    assert {grid: grids.count(grid) / 100 for grid in endings.GRIDS} == endings.GRIDS
    assert {endings.chunk_grid(chunk) for chunk in range(0, 100, 11)} == set(endings.GRIDS)  # the dense ones, too


# ------------------------------------------------------------------ questions


def chunk() -> dict[str, np.ndarray]:
    """Two prompts on a grid of 4; the first lane's third state is stopped at with 2 steps."""
    return {
        "grid": np.asarray(4),
        "prompt": np.asarray(["a red circle", "a blue star"]),
        "state_row": np.array([0, 0, 1]),
        "state_step_index": np.array([1, 3, 4]),
        "state_timestep": np.array([749, 249, 0]),
        "state_goes_on": np.array([1, 1, 2]),
        "state_x0": np.arange(3, dtype=np.float16)[:, None, None, None] * np.ones((1, 8, 16, 16), np.float16),
        "ending_row": np.array([0, 0, 1]),
        "ending_state": np.array([1, -1, -1]),
        "ending_evaluations": np.array([2, 0, 0]),
        "ending_satisfied": np.array([True, False, True]),
        "ending_final": np.ones((3, 8, 16, 16), np.float16),
        "ending_objects": np.arange(3, dtype=np.float16)[:, None, None] * np.ones((1, 6, 5), np.float16),
    }


def test_questions_by_hand() -> None:
    states, ends = verifier.asked_of_states(chunk()), verifier.asked_of_endings(chunk())
    assert states.captions == ["a red circle", "a red circle", "a blue star"]
    assert states.timesteps.tolist() == [749, 249, 0]
    assert states.evaluations.tolist() == [[3, 0], [1, 2], [0, 0]]
    assert states.labels.tolist() == [[0, UNASKED], [0, 1], [1, UNASKED]]
    assert states.objects[:, 0, 0].tolist() == [1, 1, 2]
    assert ends.labels.tolist() == [[1, UNASKED], [0, UNASKED], [1, UNASKED]]
    assert ends.timesteps.tolist() == [0, 0, 0] and ends.evaluations.sum() == 0
    both = Questions.join([states, ends])
    again = both.take(torch.tensor([3, 0]))
    assert again.captions == ["a red circle", "a red circle"] and again.labels[:, 0].tolist() == [1, 0]


def test_what_a_stop_spares_a_picture_is_what_the_grid_had_left_but_for_its_finish() -> None:
    table = chunk() | {"ending_state": np.array([0, 1, -1]), "ending_evaluations": np.array([1, 3, 0])}
    assert endings.evaluations_spared(table).tolist() == [2, 0, 0]
    assert verifier.asked_of_endings(table).evaluations.tolist() == [[2, 0], [0, 0], [0, 0]]


def test_early_stops_are_drawn_twice() -> None:
    chosen = torch.tensor([True, False, True, True])
    assert verifier.twice(torch.tensor([0, 1, 3]), chosen).tolist() == [0, 1, 3, 0, 3]


def test_a_caption_is_held_out_with_all_its_pictures() -> None:
    captions = [f"caption {i % 60}" for i in range(300)]
    asked = Questions(torch.zeros(300), captions, *[torch.zeros(300)] * 2, torch.zeros(300, 2), torch.zeros(300))
    kept, held = verifier.split(asked)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(300)) and len(held)
    assert not {captions[i] for i in kept} & {captions[i] for i in held}


def test_too_few_captions_to_hold_any_out_are_refused() -> None:
    asked = Questions(torch.zeros(4), ["a red circle"] * 4, *[torch.zeros(4)] * 2, torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="1 different captions are too few"):
        verifier.split(asked)


def test_only_satisfied_endings_get_a_wrong_caption_and_the_label_of_it() -> None:
    number = 400
    satisfied = torch.arange(number) % 2
    labels = torch.stack([satisfied.float(), torch.full((number,), UNASKED)], 1)
    batch = Questions(torch.zeros(number), ["a red circle"] * number, *[torch.zeros(number)] * 2, labels, labels)
    told = verifier.mislabel(batch, torch.Generator().manual_seed(0))
    changed = torch.tensor([caption != "a red circle" for caption in told.captions])
    assert not changed[satisfied == 0].any() and 0.01 < float(changed[satisfied == 1].float().mean()) < 0.15
    assert torch.equal(told.labels[:, 0], (satisfied.bool() & ~changed).float())
    assert torch.equal(batch.labels[:, 0], satisfied.float())  # what it came from is as it was


def test_what_was_not_tried_is_not_learned_from() -> None:
    logits = torch.tensor([[2.0, 50.0], [-1.0, 1.0]])
    labels = torch.tensor([[1.0, UNASKED], [0.0, 1.0]])
    by_hand = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0)) + np.log1p(np.exp(-1.0))) / 3
    assert float(verifier.success_loss(logits, labels)) == pytest.approx(by_hand)


@settings(max_examples=50)
@given(st.floats(0.3, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_calibration_finds_scale_and_biases(scale: float, bias: float, finished_bias: float) -> None:
    logits, finished = torch.linspace(-3, 3, 401), torch.arange(401) % 3 == 0
    chances = torch.sigmoid(scale * logits + torch.where(finished, finished_bias, bias))
    found = verifier.calibrate(logits, chances, finished)
    assert found == pytest.approx((scale, bias, finished_bias), abs=0.02)


@pytest.mark.parametrize("older", [False, True])
def test_training_can_go_on_from_a_verifier(older: bool, tmp_path: Path) -> None:
    """An older one has one stem, which is where both start."""
    small = {"width": 16, "layers": 1, "heads": 2, "channels": 4, "stem": 8}
    tokenizer = verifier.build_tokenizer()
    before, after = (LatentTextReward(len(tokenizer), **small) for _ in range(2))
    before.save_pretrained(tmp_path, tokenizer)
    if older:
        held = load_file(tmp_path / "model.safetensors")
        new = ("finished_stem", "finer", "spared")
        save_file({k: v for k, v in held.items() if not k.startswith(new)}, tmp_path / "model.safetensors")
    verifier.go_on_from_verifier(tmp_path, after)
    latents = torch.randn(2, 4, 16, 16)
    torch.testing.assert_close(after.stem(latents), before.stem(latents), atol=1e-2, rtol=1e-2)  # in half precision
    closely = before.stem(latents) if older else before._see_finished(latents)
    torch.testing.assert_close(after._see_finished(latents), closely, atol=1e-2, rtol=1e-2)


def test_an_unknown_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--warm-start.*'0'"):
        verifier.main(["--work", str(tmp_path), "--warm-start", "0"])


def test_the_whole_recipe_and_its_measurement(
    weights: Path,
    tmp_path: Path,
    tiny_kwargs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Record, train from scratch, measure: on a small model, with few prompts."""
    from addiff_env.loading.paths import resolve_model

    make = LatentTextReward

    def small(*args: Any, **kwargs: Any) -> LatentTextReward:
        return make(*args, **kwargs | {"width": 16, "heads": 2, "channels": 4, "stem": 8})

    monkeypatch.setattr(verifier, "LatentTextReward", small)
    words = ["--out", str(weights), "--work", str(tmp_path / "work")]
    command_line(monkeypatch, *words, "--batch", "24", "--number", "24", "--stops", "1", "--dtype", "float32")
    endings.main()
    command_line(monkeypatch, *words, "--steps", "4", "--batch", "16", "--layers", "1", "--warm-start", "none")
    verifier.main()
    model = LatentTextReward.from_pretrained(weights / "verifier")
    assert model.config["layers"] == 1 and model.config["scale"] != 1.0
    assert json.loads((tmp_path / "work" / "verifier.json").read_text())
    settings = addiff_env.TINY | tiny_kwargs
    for name, place in (("clip", settings["clip"]), ("reward", settings["scorer"])):
        (weights / name).symlink_to(resolve_model(place))
    monkeypatch.setattr(auc_command, "check_picture", endings.check_picture)
    options = ["--number", "8", "--steps", "4", "--weights", str(weights), "--dtype", "float32"]
    command_line(monkeypatch, *options, "--record", str(tmp_path / "kept.npz"))
    capsys.readouterr()
    assert auc_command.main() == 1
    printed = capsys.readouterr().out
    assert "verifier, going on at 20%" in printed and "ran to the end" in printed and "four_objects" in printed
    command_line(monkeypatch, *options, "--record", str(tmp_path / "kept.npz"), "--number", "4")
    with pytest.raises(ValueError, match="8 other prompts"):
        auc_command.main()
    command_line(monkeypatch, *options, "--record", str(tmp_path / "kept.npz"), "--steps", "5")
    with pytest.raises(ValueError, match="num_inference_steps 4, not 5"):
        auc_command.main()


# ------------------------------------------------------------------ calibration


class Oracle:
    """A verifier whose probability of every question is the evaluations to come over ten."""

    limit, mean, std, latent_shape = 30.0, 0.0, 1.0, (4, 16, 16)

    def score_latents(self, latents: Any, prompts: Any, timesteps: Any, evaluations: torch.Tensor) -> torch.Tensor:
        return torch.logit((evaluations.double() + 0.5) / 10)


def test_groups_by_hand(config: EnvConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = balanced(load_split("dev"), 6)
    monkeypatch.setattr(calibration, "BATCH", 4)  # two tables, numbered through
    table = calibration.record(config, rows)
    assert table["prompt"].tolist() == [row["prompt"] for row in rows]
    for state, ending in enumerate(table["state_goes_on"]):
        assert table["ending_row"][ending] == table["state_row"][state]
        assert table["ending_state"][ending] == -1
    stopped = np.flatnonzero(table["ending_state"] >= 0)
    np.testing.assert_array_equal(table["state_row"][table["ending_state"][stopped]], table["ending_row"][stopped])
    found = {group.name: group for group in calibration.groups(Oracle(), table, [row["category"] for row in rows])}
    plain = table["state_refines"][table["ending_state"][stopped]] == 0
    for at in (3, 4, 5):
        chosen = stopped[plain & (table["state_step_index"][table["ending_state"][stopped]] == at)]
        group = found[f"stopped after {at}"]
        assert group.n == len(chosen) == len(rows)
        assert group.satisfied == pytest.approx(table["ending_satisfied"][chosen].mean())
        spared = max(0, config.num_inference_steps - at - 2)
        assert (group.foretold, group.paid) == pytest.approx((0.25, 0.05 + spared / 10))  # two evaluations to come
    assert found["after 1 refinement"].n >= 1 and set(found) >= {row["category"] for row in rows}
    assert sum(found[row["category"]].n for row in rows) == len(table["ending_row"])


def test_reliability_by_hand() -> None:
    chances, satisfied = np.array([0.05, 0.07, 0.5, 1.0]), np.array([False, True, True, True])
    assert calibration.reliability(chances, satisfied) == [
        (pytest.approx(0.06), 0.5, 2),
        (0.5, 1.0, 1),
        (1.0, 1.0, 1),
    ]


@pytest.mark.parametrize(("foretold", "paid", "passed"), [(0.72, 0.69, True), (None, 0.74, False), (0.66, 0.7, False)])
def test_a_group_passes_if_all_that_was_said_is_near(foretold: float | None, paid: float, passed: bool) -> None:
    group = calibration.Group("all", 10, 0.7, foretold, paid)
    assert group.passed is passed
    assert calibration.calibration_table([group]).endswith("pass" if passed else "FAIL")


# ------------------------------------------------------------------ one command


def test_all_lookers_are_made_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    statuses = dict.fromkeys(lookers.RECIPES, 0)

    def run(words: list[str]) -> subprocess.CompletedProcess[bytes]:
        made.append(words)
        return subprocess.CompletedProcess(words, statuses[words[5]])

    monkeypatch.setattr(subprocess, "run", run)
    folders = ["--work", str(tmp_path), "--out", str(tmp_path / "out")]
    command_line(monkeypatch, *folders, "--seed", "3", "--device", "cpu:0")
    assert lookers.main() == 0
    names = [words[5] for words in made]
    assert names == list(lookers.RECIPES) and names.index("endings") < names.index("verifier")
    assert all(words[6:14] == [*folders, "--seed", "3", "--device", "cpu:0"] for words in made)
    assert set(json.loads((tmp_path / "lookers.json").read_text())) == set(names)
    made.clear()
    command_line(monkeypatch, "--work", str(tmp_path), "--only", "verifier,clip")
    lookers.main()
    assert [words[5] for words in made] == ["clip", "verifier"]
    made.clear()
    statuses["dino"] = 3
    command_line(monkeypatch, "--work", str(tmp_path))
    assert lookers.main() == 3 and [words[5] for words in made] == ["data", "generate", "clip", "dino"]
    command_line(monkeypatch, "--work", str(tmp_path), "--only", "nose")
    with pytest.raises(ValueError, match="nose"):
        lookers.main()


def test_a_recipe_without_its_data_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"chunk_.*train endings"):
        verifier.load_questions(tmp_path)
