"""The learning bar: its shortcuts give what plain runs give, and agents that should fail do."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from addiff_env import cli
from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation import acceptance
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods import rollouts
from addiff_env.evaluation.methods.rule_policies import RefineAlways, StopAt, ThresholdRule
from addiff_env.pipeline import make_agent_env
from addiff_env.sb3 import observation_parts
from addiff_env.types import Action

CONTINUE, STOP, REFINE = (int(action) for action in Action)
ITEMS = [
    Item("a red circle", 3, "single_object"),
    Item("two blue squares", 1, "counting"),
    Item("a star above a green ring", 4, "position"),
    Item("a pink cross", 1, "colors"),
    Item("a large circle", 5, "single_object"),
]


@pytest.fixture(scope="module")
def settings(small_kwargs):
    kwargs = {**small_kwargs, "finish_steps": 1, "max_nfe": 10, "prompts": [item.prompt for item in ITEMS]}
    return {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": kwargs}, "hidden": 8}


@pytest.fixture(scope="module")
def env(settings):
    return make_agent_env(Agent(PolicyNet({"x": 1}), settings), 3)


def planted(settings, env, folder, bias):
    """An agent that always prefers its actions in the order of ``bias``, whatever it sees."""
    parts = observation_parts(env)
    net = PolicyNet(parts, 8)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor(bias))
    Agent(net, settings | {"observation": parts}).save(folder)
    return folder


def test_stopping_after_k_steps_is_worth_what_a_plain_run_gives(env):
    made = {run.name: run for run in rollouts.constants(env, ITEMS)}
    assert list(made) == [*(f"stop-{k}" for k in (2, 3, 4, 5)), "always-continue", "refine-always"]
    for name, policy in [("stop-2", StopAt(2, 6)), ("stop-5", StopAt(5, 6)), ("always-continue", StopAt(6, 6))]:
        plain = rollouts.run_policy(env, policy, ITEMS, name)
        assert made[name].values == pytest.approx(plain.values, abs=1e-4)
        assert [e.actions for e in made[name].episodes] == [e.actions for e in plain.episodes]
        assert made[name].nfe.tolist() == plain.nfe.tolist()
    assert made["stop-3"].nfe.tolist() == [4] * 5  # with one finishing step
    assert set(made["refine-always"].episodes[0].actions) >= {REFINE}


@pytest.mark.parametrize("look_at", [2, 4])
def test_every_threshold_is_worth_what_its_rule_gives(env, look_at):
    found = rollouts.stop_outcomes(env, ThresholdRule(look_at, np.inf, 6), look_at, ITEMS, "walk")
    scores = sorted(ending.score for own in found for ending in own[:-1])
    assert len(scores) >= len(ITEMS)  # several looks an item
    taus = [-np.inf, *(np.mean(pair) for pair in (scores[:2], scores[-2:]))]
    for tau in taus:
        plain = rollouts.run_policy(env, ThresholdRule(look_at, tau, 6), ITEMS, "rule")
        episodes = [next(e.episode for e in own if e.score >= tau) for own in found]
        assert [e.actions for e in episodes] == [e.actions for e in plain.episodes]
        assert [e.value for e in episodes] == pytest.approx(plain.values, abs=1e-3)


def test_the_rule_with_the_highest_return_is_chosen(env):
    taus = (-1.0, 5.0)
    choice = rollouts.choose_rule(env, ITEMS[:2], taus)
    worth = {
        (n, tau): rollouts.run_policy(env, ThresholdRule(n, tau, 6), ITEMS[:2], "rule").values.mean()
        for n in range(2, 6)
        for tau in taus
    }
    assert choice.value == pytest.approx(max(worth.values()), abs=1e-3)
    assert worth[choice.look_at, choice.tau] == pytest.approx(choice.value, abs=1e-3)
    assert (choice.prompts, choice.rules) == (2, 8)


def test_returns_are_the_environments_rewards(env):
    plain = rollouts.run_policy(env, RefineAlways(), ITEMS[:1], "refine-always").episodes[0]
    env.reset(options={"prompt": [ITEMS[0].prompt] * 3, "seed": [ITEMS[0].seed] * 3})
    total = sum(env.step(np.full(3, action))[1][0] for action in plain.actions)
    assert env.done.all() and plain.value == pytest.approx(total, abs=1e-4)


# ------------------------------------------------------------------ verdicts

PROMPTS = [f"prompt {k}" for k in range(40)]


def run_of(name, value, nfe=(5, 10), actions=((CONTINUE, STOP), (CONTINUE, CONTINUE, REFINE, STOP))):
    """Forty episodes with a little noise that all policies share."""
    noise = np.random.default_rng(1).normal(size=40)
    episodes = [rollouts.Episode(value + noise[k], 1.0, nfe[k % 2], actions[k % 2]) for k in range(40)]
    return rollouts.PolicyRun(name, episodes)


GOOD = run_of("agent", 0.5)


def failed(agent=GOOD, constant=0.4, rule=0.45):
    others = [run_of("stop-3", 0.1), run_of("stop-4", constant)]
    found = acceptance.conditions(agent, others, run_of("threshold-4-0", rule), PROMPTS)
    return [condition.name for condition in found if not condition.passed]


def test_a_good_agent_passes():
    assert failed() == []
    assert failed(rule=0.5) == []  # as good as the rule is not below it


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"constant": 0.5}, "return above every constant, nearest stop-4"),
        ({"constant": 0.6}, "return above every constant, nearest stop-4"),
        ({"rule": 0.51}, "return not below threshold-4-0"),
        ({"agent": run_of("agent", 0.5, nfe=(5, 8))}, "NFE vary: standard deviation"),
        ({"agent": run_of("agent", 0.5, actions=((CONTINUE, STOP), (CONTINUE, STOP)))}, "uses refine"),
        (
            {"agent": run_of("agent", 0.5, actions=((CONTINUE,) * 17, (CONTINUE,) * 17 + (REFINE, STOP)))},
            "uses stop",
        ),
    ],
)
def test_what_is_missed_is_named(change, name):
    assert name in failed(**change)


def test_a_lead_within_the_noise_is_no_lead():
    rng = np.random.default_rng(0)
    noisy = [replace(e, value=e.value - 0.05 + rng.normal()) for e in GOOD.episodes]
    found = acceptance.conditions(GOOD, [rollouts.PolicyRun("stop-4", noisy)], GOOD, PROMPTS)
    (condition,) = [one for one in found if one.name.startswith("return above")]
    assert not condition.passed and "stop-4" in condition.name


def test_pictures_of_one_prompt_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    per_prompt = np.repeat(rng.normal(size=10), 30)
    apart = acceptance.difference(per_prompt, np.zeros(300), [str(k) for k in range(300)])
    together = acceptance.difference(per_prompt, np.zeros(300), [str(k // 30) for k in range(300)])
    assert apart.estimate == together.estimate == pytest.approx(per_prompt.mean())
    assert together.high - together.low > 4 * (apart.high - apart.low)


# ------------------------------------------------------------------ command line


def run(capsys, *arguments):
    status = cli.main(["acceptance", *map(str, arguments), "--limit", "3", "--tuning", "2", "--num-envs", "3"])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_an_agent_that_only_continues_fails(settings, env, tmp_path, capsys):
    status, text, _ = run(capsys, planted(settings, env, tmp_path, [5.0, 0.0, 0.0]))
    assert status == 1 and "threshold rule: look after n = " in text
    verdicts = [line.split() for line in text.splitlines() if line.endswith(("pass", "FAIL"))]
    assert [line[-1] for line in verdicts if line[0] == "uses"] == ["pass", "FAIL", "FAIL"]
    assert [line[-1] for line in verdicts if line[0] == "NFE"] == ["FAIL"]
    assert [line[-1] for line in verdicts if line[:2] == ["return", "above"]] == ["FAIL"]  # it is a constant itself


def test_json_holds_the_same(settings, env, tmp_path, capsys):
    status, text, _ = run(capsys, planted(settings, env, tmp_path / "lazy", [0.0, 5.0, 0.0]), "--json")
    (report,) = json.loads(text)
    rows = {row["policy"]: row for row in report["rows"]}
    assert status == 1 and report["passed"] is False and report["pictures"] == 3
    assert rows["agent"]["shares"] == {"continue": 0.0, "stop": 1.0, "refine": 0.0}
    assert rows["agent"]["return"] == pytest.approx(rows["stop-2"]["return"], abs=1e-4)
    assert rows["agent"]["return"] == pytest.approx(rows["random"]["return"], abs=1e-4)  # with its own shares
    assert rows["stop-2"]["agent_ahead"][0] == pytest.approx(0, abs=1e-4)
    rule = report["rule"]
    assert f"threshold-{rule['look_at']}-{rule['tau']:g}" in rows


def test_opponents_are_kept_for_the_next_agent(settings, env, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "opponents.json"
    _, plain, _ = run(capsys, planted(settings, env, tmp_path / "lazy", [0.0, 5.0, 0.0]), "--json")
    _, first, _ = run(capsys, tmp_path / "lazy", "--json", "--opponents", kept)
    monkeypatch.setattr(acceptance, "choose_rule", None)  # nothing is measured again
    monkeypatch.setattr(acceptance, "constants", None)
    _, again, _ = run(capsys, tmp_path / "lazy", "--json", "--opponents", kept)
    assert json.loads(plain) == json.loads(first) == json.loads(again)
    status, _, error = run(capsys, tmp_path / "lazy", "--opponents", kept, "--seed", "1")
    assert status == 2 and "other seed" in error and str(kept) in error
    kept.write_text('{"stamp": {}}')
    status, _, error = run(capsys, tmp_path / "lazy", "--opponents", kept)
    assert status == 2 and "no opponents" in error


def test_what_cannot_be_measured_is_named(settings, env, tmp_path, capsys):
    status, text, error = run(capsys, tmp_path / "nothing")
    assert status == 2 and text == "" and "nothing" in error
    other = planted(settings | {"env": {"id": "AdDiffusion-SD15-v0", "kwargs": {}}}, env, tmp_path / "b", [0.0] * 3)
    status, _, error = run(capsys, other)
    assert status == 2 and "AdDiffusion-SD15-v0" in error


def test_agents_that_were_measured_are_told_whatever_comes_then(settings, env, tmp_path, capsys, monkeypatch):
    """And what can be seen of the others beforehand ends the work before it begins."""
    agents = [planted(settings, env, tmp_path / name, [0.0, 5.0, 0.0]) for name in "ab"]
    measured, measure = [], acceptance.AcceptanceTest.measure

    def once(self, folder, *rest):
        measured.append(folder)
        if len(measured) > 1:
            raise ValueError("the disk is full")
        return measure(self, folder, *rest)

    monkeypatch.setattr(acceptance.AcceptanceTest, "measure", once)
    status, text, error = run(capsys, *agents, tmp_path / "nothing", "--json")
    assert status == 2 and text == "" and "nothing" in error and measured == []
    status, text, error = run(capsys, *agents, "--json")
    assert status == 2 and "the disk is full" in error
    assert [report["agent"] for report in json.loads(text)] == [str(agents[0])]


@pytest.mark.parametrize("number", [0, -1])
def test_a_rule_cannot_be_chosen_on_nothing(tmp_path, capsys, number):
    with pytest.raises(SystemExit) as ended:
        acceptance.main([str(tmp_path), "--tuning", str(number)])
    assert ended.value.code == 2 and f"--tuning: must be at least 1, got {number}" in capsys.readouterr().err
