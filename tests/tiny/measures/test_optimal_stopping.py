"""Policies on recorded trajectories, by hand; and success by stop and finish on a small model."""

from typing import Any

import numpy as np
import pytest
import torch

import addiff_env
from addiff_env.env.config import EnvConfig
from addiff_env.tiny.measures import calibration, finishes
from addiff_env.tiny.measures import optimal_stopping as dp
from addiff_env.tiny.measures.optimal_stopping import Refinement, Walks
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.recipes import endings
from addiff_env.types import Action

N = 6


def walks(prompts: int = 200, foresight: bool = True, seed: int = 0) -> Walks:
    """Every prompt once plainly and once refined; with foresight the verifier knows how each will end.

    Half of the plain trajectories fail, a refined one never does; a picture may be stopped at without harm from step 4.
    """
    rng = np.random.default_rng(seed)
    ended = np.concatenate([rng.random(prompts) < 0.5, np.ones(prompts, bool)])
    told = np.where(ended, 0.99, 0.01) if foresight else np.full(2 * prompts, ended.mean())
    go_on = np.full((2 * prompts, N), np.nan)
    go_on[:, 3:] = told[:, None]
    stop, stopped = go_on.copy(), go_on.copy()
    stop[:, 3], stopped[:, 3] = 0.01, 0.0
    stopped[:, 4:] = ended[:, None]
    row, refines = np.tile(np.arange(prompts), 2), np.repeat([0, 1], prompts)
    source = np.where(refines == 1, np.tile(np.arange(prompts), 2), -1)
    return Walks(row, refines, stop, go_on, stopped, ended, source, np.where(refines == 1, 3, -1), finish_steps=1)


def test_fixed_stops_by_hand() -> None:
    made = walks()
    satisfied = made.ended[made.refines == 0].mean()
    for after, success, evaluations in ((3, 0.0, 4.0), (4, satisfied, 5.0), (5, satisfied, 6.0), (6, satisfied, 6.0)):
        found = dp.mean_outcome(made, dp.fixed(after), Refinement())
        assert found == pytest.approx((success, evaluations))


def test_a_refinement_is_worth_what_followed_it() -> None:
    made = walks()
    refinement = dp.refinement_under(made, dp.threshold(3, 0.5))
    failed = made.features(3)[(made.refines == 0) & ~made.ended]
    outcome = refinement(failed, 3)
    assert outcome[:, 0] == pytest.approx(1.0, abs=0.02)
    assert outcome[:, 1] == pytest.approx(dp.REFINE_K + N - 3, abs=0.1)
    found = dp.mean_outcome(made, dp.threshold(3, 0.5), refinement)
    share = 1 - made.ended[made.refines == 0].mean()
    assert found == pytest.approx((1.0, N + share * dp.REFINE_K), abs=0.05)


@pytest.mark.parametrize("price", [0.001, 0.02])
def test_dynamic_programming_does_what_pays(price: float) -> None:
    made = walks()
    policy = dp.improve(made, price)
    doomed, fine = made.features(3)[~made.ended], made.features(3)[made.ended]
    assert (policy(doomed, 3) == Action.REFINE).all() and (policy(fine, 3) == Action.CONTINUE).all()
    found = dp.compare(made, price)
    worth = {name: success - price * evaluations for name, (success, evaluations) in found.items()}
    assert max(worth, key=lambda name: worth[name]) in ("two-step", "dynamic programming", "threshold")
    assert worth["dynamic programming"] >= max(worth.values()) - 0.01
    assert worth["dynamic programming, no refining"] <= worth["dynamic programming"]


def test_a_refinement_that_costs_more_than_it_gains_is_left_alone() -> None:
    policy = dp.improve(walks(foresight=False), 0.4)
    assert (policy(walks().features(3), 3) != Action.REFINE).all()


class Teller:
    """A verifier whose probability is a tenth of the evaluations to come, and a twentieth."""

    limit, mean, std, latent_shape = 30.0, 0.0, 1.0, (4, 16, 16)

    def score_latents(self, latents: Any, prompts: Any, timesteps: Any, evaluations: torch.Tensor) -> torch.Tensor:
        return torch.logit(evaluations / 10 + 0.05)


def test_a_record_becomes_walks(small_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = np.random.default_rng(0)
    outcome = {"score": 0.5, "objects": ()}
    monkeypatch.setattr(
        endings, "check_picture", lambda *_: type("CheckResult", (), outcome | {"satisfied": verdicts.random() < 0.5})
    )
    settings = addiff_env.TINY | small_kwargs | {"finish_steps": 2, "warmup_steps": 3}
    table = calibration.record(EnvConfig(**settings), balanced(load_split("dev"), 6))
    made = dp.walks_of(table, Teller())
    assert (made.refines == 0).sum() == 6 and made.first == 3 and made.steps == 6
    assert sorted(made.row[made.refines == 0]) == list(range(6))
    np.testing.assert_allclose(made.stop[:, 3:], 0.25, rtol=1e-5)  # two evaluations, whenever it stops
    np.testing.assert_allclose(made.go_on[:, 3:], [[0.35, 0.25, 0.15]] * len(made), rtol=1e-5)
    assert np.isnan(made.stop[:, :3]).all()
    for walk in np.flatnonzero(made.source >= 0):
        parent = made.source[walk]
        assert made.row[parent] == made.row[walk] and made.refines[parent] == made.refines[walk] - 1
        assert 3 <= made.left_at[walk] < 6
    for state, ending in zip(table["ending_state"], range(len(table["ending_row"])), strict=True):
        if state >= 0:
            row, refines = table["state_row"][state], table["state_refines"][state]
            walk = np.flatnonzero((made.row == row) & (made.refines == refines))[0]
            assert made.stopped[walk, table["state_step_index"][state]] == table["ending_satisfied"][ending]


def test_tables_name_every_policy_and_price() -> None:
    text = dp.table(walks(40), (0.004, 0.016))
    assert text.startswith("40 prompts") and text.count("two-step") == 2 and text.count("dynamic programming") == 4


def test_stops_of_a_grid_are_judged_after_their_finish(
    small_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def check_picture(picture: np.ndarray, prompt: str) -> Any:
        seen.append(picture)
        return type("CheckResult", (), {"satisfied": len(seen) % 2 == 0})

    monkeypatch.setattr(finishes, "check_picture", check_picture)
    config = EnvConfig(**addiff_env.TINY | small_kwargs | {"num_inference_steps": 4, "finish_steps": 2})
    rows = [{"prompt": "a red circle", "seed": 3}, {"prompt": "a blue star", "seed": 4}]
    found = finishes.outcomes(config, rows, 2, (1, 2, 3))
    assert set(found) == {(2, 1), (2, 2), (3, 1), (4, 0)} and len(seen) == 8
    assert all(values.tolist() == [False, True] for values in found.values())
    pictures = dict(zip(found, np.reshape(seen, (4, 2, 64, 64, 3)).astype(int), strict=True))
    for whole in ((2, 2), (3, 1)):  # as many steps as the grid has left: the same end
        assert np.abs(pictures[whole] - pictures[4, 0]).max() <= 1
    assert np.abs(pictures[2, 1] - pictures[4, 0]).max() > 1
