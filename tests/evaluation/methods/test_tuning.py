"""Baselines tuned to an agent: what is chosen, what it stands for, and that a run keeps it."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from addiff_env.env.config import EnvConfig
from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.methods import tuning as tuning_module
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.registry import AUTO, make_method
from addiff_env.evaluation.methods.rule_policies import RandomPolicy, StopAt
from addiff_env.evaluation.methods.tuning import (
    MATCHED,
    Measured,
    Tuning,
    best_matched,
    best_of_grid,
    measure,
    random_spec,
    resolve,
    threshold_grid,
    tune,
    tuning_fingerprint,
    tuning_items,
)
from addiff_env.evaluation.metrics.registry import open_metrics
from addiff_env.evaluation.run import runner
from addiff_env.evaluation.run.evaluation_run import EvaluationRun
from addiff_env.types import Action

ROOT = Path(__file__).parents[3]
TUNING_SPECS = ("threshold:5:0.5", "random:0.8:0.1:0.1", "words-7.5", "best-of-2:ddim-5")
TUNING = Tuning(*TUNING_SPECS, "success", {"agent": "a"}, [])


def rule(spec: str, quality: float, net_flops: float) -> Measured:
    return Measured(spec, quality, net_flops, 5.0)


def test_the_best_rule_at_the_agents_compute_is_chosen() -> None:
    rules = [rule("cheap", 0.5, 50), rule("good", 0.7, 101), rule("dear", 0.9, 130), rule("same", 0.7, 90)]
    assert best_matched(rules, 100).spec == "same"  # as good as the dearer one
    assert best_matched(rules, 95).spec == "same"
    assert best_matched(rules, 60).spec == "cheap"
    assert best_matched(rules, 10).spec == "cheap"  # none is affordable: the one that exceeds least
    with pytest.raises(ValueError, match="no rule"):
        best_matched([], 10)


@given(st.integers(1, 400).flatmap(lambda n: st.lists(st.integers(0, n), min_size=2, max_size=2).map(
    lambda cuts: np.diff([0, *sorted(cuts), n]) / n)))  # fmt: skip
@example(np.array([0, 1, 159]) / 160)  # each rounds up: with four digits they would add up to more than 1
def test_any_agents_action_shares_make_a_random_policy(shares: np.ndarray) -> None:
    name, *texts = random_spec(shares.tolist()).split(":")
    assert name == "random" and not any("-" in text and "e" not in text for text in texts)
    np.testing.assert_allclose(RandomPolicy([float(text) for text in texts]).shares, shares, atol=2e-4)


def test_best_of_n_gets_the_steps_that_the_agents_compute_pays_for(small_kwargs: dict[str, Any]) -> None:
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs).unwrapped
    item = load_benchmark("tiny-dev", 1)
    for number in (2, 3):
        ((_, made),) = next(iter(make_method(f"best-of-{number}:ddim-4", env).make(item)))
        assert f"best-of-{number}:ddim-4" in best_of_grid(env, made.net_flops)
        assert f"best-of-{number}:ddim-3" in best_of_grid(env, 0.97 * made.net_flops)
    assert best_of_grid(env, 0.0) == ["best-of-2:ddim-1"]


def test_the_command_names_its_mistakes() -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere/agent"):
        tuning_module.main(["--agent", "/nowhere/agent"])
    words = tuning_module.describe(TUNING)
    assert words.splitlines()[-1] == "methods=[threshold:5:0.5,random:0.8:0.1:0.1,words-7.5,best-of-2:ddim-5]"


def test_auto_is_replaced_and_kept(tmp_path: Path) -> None:
    path, made = tmp_path / "run" / "tuning.json", []

    def make() -> Tuning:
        made.append(1)
        return TUNING

    specs = ["ddim-5", *AUTO]
    wanted = ["ddim-5", *TUNING_SPECS]
    assert resolve(["ddim-5"], path, {"agent": "a"}, make) == ["ddim-5"] and not path.exists()
    assert resolve(specs, path, {"agent": "a"}, make) == wanted
    assert resolve(specs, path, {"agent": "a"}, make) == wanted and len(made) == 1  # another shard, or a rerun
    with pytest.raises(ValueError, match="tuned with .*'a'.* not with .*'b'.*: delete it"):
        resolve(specs, path, {"agent": "b"}, make)
    assert [other.name for other in path.parent.iterdir()] == ["tuning.json"]
    path.write_text(path.read_text().replace('"fingerprint"', '"stamp"'))  # as the first releases wrote it
    assert resolve(specs, path, {"agent": "a"}, make) == wanted and len(made) == 1
    path.write_text(json.dumps({"threshold": "threshold:5:0.5"}))
    with pytest.raises(ValueError, match="tuned by another release.*delete it"):
        resolve(specs, path, {"agent": "a"}, make)


def test_the_first_of_several_processes_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"

    def overtaken() -> Tuning:
        path.write_text(json.dumps(asdict(TUNING)))
        return Tuning("threshold:9:9", "", "", "", "success", {"agent": "a"}, [])

    assert resolve(["threshold:auto"], path, {"agent": "a"}, overtaken) == ["threshold:5:0.5"]


class Drawn:
    """Random actions under the name of an agent, which looks at everything."""

    fingerprint, flops = "drawn", 0.0

    def __init__(self, shares: Any) -> None:
        policy = RandomPolicy(shares)
        self.act, self.act_in = policy.act, policy.act_in


def test_tuning_measures_the_agent_and_a_grid(small_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", 4, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs).unwrapped
    assert threshold_grid(env, [0.0, 1.0]) == [
        f"threshold:{n}:{t:g}" for n in (3, 4, 5) for t in (0.1, 0.25, 0.5, 0.75)
    ]
    monkeypatch.setattr(tuning_module, "LOOKS", (1.0,))
    monkeypatch.setattr(tuning_module, "QUANTILES", (0.5,))
    items = load_benchmark("tiny-dev", 4)
    metrics, metric = open_metrics(["checker"], env.perception, items)[0], "success"
    agent: Any = Drawn([0.7, 0.1, 0.2])
    found = tune(env, agent, items, metrics, metric)
    own, rule_, *several = found.measured
    made = [result for group in PolicyMethod(env, agent).make(list(items)) for _, result in group]
    taken = np.array([action for result in made for action in result.actions])
    shares = [float(np.mean(taken == action)) for action in Action]
    assert own["shares"] == pytest.approx(shares) and own["nfe"] == np.mean([result.nfe for result in made])
    assert found.threshold == rule_["spec"] and found.threshold.startswith("threshold:5:")
    drawn = make_method(found.spec("random:auto"), env)
    assert isinstance(drawn, PolicyMethod)
    assert [float(share) for share in found.random.split(":")[1:]] == pytest.approx(shares, abs=1e-3)
    assert found.words == f"words-{round(own['nfe'], 1):g}"
    assert [one["spec"] for one in several] == best_of_grid(env, own["net_flops"]) and several
    assert found.best_of in {one["spec"] for one in several}
    assert all(one["net_flops"] <= MATCHED * own["net_flops"] for one in several)
    assert (
        found.fingerprint
        == tuning_fingerprint(agent, env, items, "success")
        != tuning_fingerprint(agent, env, items[:2], "success")
    )
    stopped = measure(PolicyMethod(env, StopAt(3, 6), "stop"), env, items, metrics, metric)
    assert stopped.nfe == 3 and len(stopped.reward_scores) == 4
    with pytest.raises(ValueError, match="'beauty' says nothing of 4 tuning prompts"):
        tune(env, agent, items, metrics, "beauty")


def run_of(cfg: Any, folder: Path) -> EvaluationRun:
    run = EvaluationRun(cfg, folder)
    run.agents = {"agent": SimpleNamespace(fingerprint="a")}  # type: ignore[dict-item]
    return run


def test_the_embedded_world_is_tuned_on_dev_prompts_that_test_does_not_share(
    small_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = {item.prompt for item in load_benchmark("tiny-test")}
    shared = test & {item.prompt for item in load_benchmark("tiny-dev")}
    assert len(shared) == 18  # the splits share single-object captions
    seen: list[Item] = []

    def tuned(env: Any, agent: Any, items: Any, metrics: Any, metric: str, price: Any) -> Tuning:
        seen.extend(items)
        return Tuning(*TUNING_SPECS, metric, tuning_fingerprint(agent, env, items, metric), [])

    monkeypatch.setattr(runner, "tune", tuned)
    env = SimpleNamespace(config=EnvConfig(**small_kwargs, prompts=["a red circle"]))
    maker: Any = SimpleNamespace(env=env, metrics=[])
    cfg = OmegaConf.load(ROOT / "configs" / "evaluate.yaml")  # at its default limits
    assert runner.tuned_specs(run_of(cfg, tmp_path), AUTO, maker, "success") == [*TUNING_SPECS]
    assert len(seen) == cfg.tune.limit and not test & {item.prompt for item in seen}
    counts = {category: [item.category for item in seen].count(category) for category in {i.category for i in seen}}
    assert len(counts) == 7 and max(counts.values()) - min(counts.values()) <= 1  # categories still take turns
    cfg.benchmark.limit = 4
    runner.tuned_specs(run_of(cfg, tmp_path), AUTO, maker, "success")  # another limit keeps the tuning


def test_lists_of_any_length_are_evaluated_and_tuned_on_where_that_is_asked_for(
    small_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("drawbench/drawbench.txt", "a cat\n"), ("coco/coco_8k_captions.txt", "a cat\na cow\n")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(runner, "resolve", lambda specs, path, fingerprint, make: fingerprint)
    env = SimpleNamespace(config=EnvConfig(**small_kwargs, prompts=["a red circle"]))
    maker: Any = SimpleNamespace(env=env, metrics=[])
    cfg = OmegaConf.load(ROOT / "configs" / "evaluate.yaml")
    cfg.merge_with_dotlist([f"benchmark.root={tmp_path}", "benchmark.name=drawbench", "tune.benchmark=coco-8k"])
    with pytest.raises(ValueError, match="has 1 prompts, .*of evaluate.py benchmark.any_length=true"):
        runner.tuned_specs(run_of(cfg, tmp_path), AUTO, maker, "success")
    cfg.benchmark.any_length = True
    assert runner.tuned_specs(run_of(cfg, tmp_path), AUTO, maker, "success")["items"] == 1  # not the cat


def test_only_prompts_of_its_own_are_left_to_tune_on(tmp_path: Path) -> None:
    (tmp_path / "dev.txt").write_text("a cat\na dog\na cow\n")
    (tmp_path / "test.txt").write_text("a dog\na cat\n")
    test = load_benchmark(str(tmp_path / "test.txt"))
    assert [item.prompt for item in tuning_items(str(tmp_path / "dev.txt"), 2, test)] == ["a cow"]
    with pytest.raises(ValueError, match="every prompt of .*test.txt.* name others"):
        tuning_items(str(tmp_path / "test.txt"), 2, test)
    with pytest.raises(ValueError, match="tune.limit must be a whole number of at least 1.*got 0"):
        tuning_items(str(tmp_path / "dev.txt"), 0, test)
