"""The table of an agent's prices, measured: against a run by hand, and gone on with after an interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
from models import thrifty_agent

from addiff_env import cli
from addiff_env.agent import Agent
from addiff_env.agent.price_table import PriceTable
from addiff_env.env.reward import quality
from addiff_env.evaluation import price_table
from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.loading.paths import resolve_model
from addiff_env.pipeline import make_agent_env
from addiff_env.tiny.checker import check_picture

RANGE = [0.001, 0.016]


@pytest.fixture
def bundle(small_kwargs, tmp_path):
    agent = thrifty_agent(small_kwargs)
    agent.config["reward"] = {"reward_mean": 0.5, "reward_std": 2.0}
    agent.save(tmp_path)
    return tmp_path


def by_hand(folder, price):
    agent = Agent.load(folder)
    env, rows = make_agent_env(agent, 1, reward=agent.config["reward"]), []
    for item in load_benchmark("tiny-dev", 3):
        observation, info = env.reset(options={"prompt": [item.prompt], "seed": [item.seed], "price": price})
        rewards = []
        while not env.done[0]:
            observation, reward, _, _, info = env.step(agent.act(observation, info["action_mask"]))
            rewards.append(reward[0])
        flops = info["net_flops"][0] + len(rewards) * agent.flops
        good = check_picture(env.final_image(0), item.prompt).satisfied
        scores = env.clip_score, env.reward_score
        rows.append([info["nfe"][0], flops, sum(rewards), quality(*scores, env.reward_config)[0], good])
    return np.mean(rows, axis=0)


def test_the_table_is_what_running_the_agent_gives(bundle, capsys):
    assert cli.main(["agent", "table", str(bundle), "--limit", "3", "--prices", "0.016", "0.001"]) == 0
    table = Agent.load(bundle).price_table
    assert [point.price for point in table.points] == [0.001, 0.016]
    assert [point.nfe for point in table.points] == [6, 2]
    for point in table.points:
        measured = [point.nfe, point.net_flops, point.reward, point.quality, point.success]
        np.testing.assert_allclose(measured, by_hand(bundle, point.price), rtol=1e-4, atol=1e-4)
    assert Agent.load(bundle).price_for(target_nfe=6) == pytest.approx(0.001)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "3 pictures of tiny-dev" and [line.split()[0] for line in shown[2:]] == ["0.001", "0.016"]


def test_an_interrupted_table_goes_on_and_may_grow(bundle, monkeypatch):
    measured, measure = [], price_table.measure_price

    def counted(env, agent, items, price, judged):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(price)
        return measure(env, agent, items, price, judged)

    monkeypatch.setattr(price_table, "measure_price", counted)
    with pytest.raises(KeyboardInterrupt):
        price_table.record_table(bundle, limit=1)
    assert len(Agent.load(bundle).price_table.points) == 2
    monkeypatch.setattr(price_table, "measure_price", lambda *rest: measured.append(rest[3]) or measure(*rest))
    whole = price_table.record_table(bundle, limit=1)
    assert measured == sorted(set(measured)) and len(measured) == price_table.NUMBER
    assert (measured[0], measured[-1]) == tuple(RANGE)
    grown = price_table.record_table(bundle, limit=1, prices=[0.005, 0.001])
    assert len(grown.points) == len(whole.points) + 1 and len(measured) == price_table.NUMBER + 1
    anew = price_table.record_table(bundle, limit=2, prices=[0.005])  # other prompts
    assert [point.price for point in anew.points] == [0.005]
    assert Agent.load(bundle).price_table == PriceTable.read(json.loads(json.dumps(anew.kept())))


@pytest.mark.parametrize("price", ["0.02", "0", "nan"])
def test_prices_beyond_the_range_are_refused_and_nothing_is_lost(bundle, price, capsys):
    assert cli.main(["agent", "table", str(bundle), "--limit", "1", "--prices", "0.004", price]) == 1
    assert "price must" in capsys.readouterr().err
    assert Agent.load(bundle).price_table is None


def test_an_agent_without_a_price_input_has_no_table(capsys):
    before = sorted(Path(resolve_model("addiff_env:tiny/weights/agent")).iterdir())
    assert cli.main(["agent", "table", "addiff_env:tiny/weights/agent"]) == 1
    assert "no price input" in capsys.readouterr().err
    assert sorted(Path(resolve_model("addiff_env:tiny/weights/agent")).iterdir()) == before


def test_a_file_of_other_prompts_has_no_verdicts(bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text("red red red\n")
    (point,) = price_table.record_table(bundle, str(tmp_path / "prompts.txt"), prices=[0.004]).points
    assert point.success is None
