"""What was measured reaches the bundle and the model card, and only what belongs to the agent."""

import json
from dataclasses import asdict, replace

import pytest
from huggingface_hub import ModelCard

from addiff_env import cli
from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation import share
from addiff_env.evaluation.run.rows import append_rows
from addiff_env.types import ResultRow


@pytest.fixture
def agent(tmp_path):
    made = Agent(PolicyNet({"quality": 8}, 4), {"observation": {"quality": 8}, "hidden": 4, "env": {"id": "E"}})
    made.save(tmp_path / "agent")
    return made


@pytest.fixture
def rows(agent):
    row = ResultRow("agent", "a star", 0, "colors", "m@1", "ddim-10", agent.fingerprint, "float32", "v1")
    made = [(1.0, 5, 1.0), (1.0, 7, 0.5), (0.0, 12, -1.0), (1.0, 8, 2.5)]
    return [
        replace(
            row, prompt=f"a star, {k}", seed=k, nfe=nfe, net_flops=2e9 * nfe, scores=dict(success=ok, reward_score=s)
        )
        for k, (ok, nfe, s) in enumerate(made)
    ]


def write(folder, rows):
    folder.mkdir()
    append_rows(folder / "rows.jsonl", rows)
    (folder / "config.yaml").write_text("benchmark: {name: tiny-test, limit: 4}\nenv: {}\n")
    (folder / "items.jsonl").write_text("{}\n" * 4)
    return folder


def test_results_go_from_the_rows_into_bundle_and_card(agent, rows, tmp_path, capsys):
    others = [replace(rows[0], method="ddim-50", policy="ddim-50", nfe=50), replace(rows[0], policy="another", nfe=99)]
    run = write(tmp_path / "run", [*rows, *others])
    assert share.main([str(tmp_path / "agent"), "--evaluation", str(run), "--card"]) == 0
    results = Agent.load(tmp_path / "agent").config["results"]["tiny-test"]
    assert results["success"] == 0.75 and results["reward_score"] == 0.75 and results["pictures"] == 4
    assert results["nfe"] == 8 and results["nfe_std"] == pytest.approx(6.5**0.5, abs=1e-4)
    assert results["net_gflops"] == 16
    assert results["success_95_low"] == pytest.approx(0.3006, abs=1e-4)  # Wilson's interval of 3 in 4
    assert results["success_95_high"] == pytest.approx(0.9544, abs=1e-4)
    card = ModelCard(capsys.readouterr().out)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["success"] == 0.75 and "| nfe | 8.0 |" in card.text


@pytest.mark.parametrize("value", [float("nan"), 1e300, None])
def test_a_score_that_some_pictures_lack_is_no_result(agent, rows, tmp_path, value):
    rows[0].scores = {"reward_score": 1.0} if value is None else {"success": value, "reward_score": 1.0}
    (tmp_path / "run").mkdir()
    lines = [json.dumps({key: kept for key, kept in asdict(row).items() if kept is not None}) for row in rows]
    write(tmp_path / "other", rows[1:])
    (tmp_path / "other" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    results = share.measured(agent, tmp_path / "other")["tiny-test"]
    assert "success" not in results and "success_95_low" not in results and results["reward_score"] == 0.75


def test_each_of_several_agents_finds_its_own_rows(agent, rows, tmp_path):
    """Evaluated together, they are named after their training seeds; the controls of one are none of its rows."""
    own = [replace(row, method="agent-s1") for row in rows]
    others = [replace(row, method="agent-s0", policy="0123456789ab", nfe=99) for row in rows]
    controls = [replace(row, method="agent-s1, mask=full", nfe=50) for row in rows]
    ((name, numbers),) = share.measured(agent, write(tmp_path / "run", [*others, *own, *controls])).items()
    assert name == "tiny-test" and numbers["pictures"] == 4 and numbers["nfe"] == 8


def test_pushing_sends_what_was_recorded(agent, rows, tmp_path, monkeypatch, capsys):
    pushed = []

    def push(self, repo_id, private=None):
        pushed.append((repo_id, private, self.config["results"]["tiny-test"]["nfe"]))
        return "https://hub/commit/1"

    monkeypatch.setattr(Agent, "push_to_hub", push)
    run = write(tmp_path / "run", rows)
    options = [str(tmp_path / "agent"), "--evaluation", str(run), "--push", "someone/mine", "--private"]
    assert share.main(options) == 0
    assert pushed == [("someone/mine", True, 8)] and "https://hub/commit/1" in capsys.readouterr().out
    assert share.main([str(tmp_path / "agent"), "--push", "someone/mine"]) == 0  # the bundle has kept them
    assert pushed[1] == ("someone/mine", None, 8)


def test_rows_of_others_and_mixtures_are_refused(agent, rows, tmp_path, capsys):
    alien = write(tmp_path / "alien", [replace(row, policy="0123456789ab") for row in rows])
    mixed = write(tmp_path / "mixed", [*rows, replace(rows[0], code_version="v2")])
    partly = write(tmp_path / "partly", rows[:3])
    altered = write(tmp_path / "altered", rows)
    (altered / "config.yaml").write_text("benchmark: {name: tiny-test, limit: 4}\nenv: {guidance_scale: 7}\n")
    refused = {partly: "3 of 4 pictures", altered: "'guidance_scale': 7", alien: agent.fingerprint, mixed: "v2"}
    for folder, words in {**refused, tmp_path / "none": "none"}.items():
        assert cli.main(["share", str(tmp_path / "agent"), "--evaluation", str(folder)]) == 1
        assert words in capsys.readouterr().err
    assert "results" not in Agent.load(tmp_path / "agent").config


def test_each_price_has_its_own_results(agent, rows, tmp_path):
    cheap, dear = ([replace(row, method=f"agent@{p!r}", price=p, nfe=round(1 / p)) for row in rows] for p in (0.1, 0.2))
    found = share.measured(agent, write(tmp_path / "run", [*cheap, *dear]))
    assert {name: numbers["nfe"] for name, numbers in found.items()} == {
        "tiny-test, price 0.1": 10,
        "tiny-test, price 0.2": 5,
    }
    with pytest.raises(ValueError, match=r"3 of 4 pictures of agent@0.2 .*finish it"):
        share.measured(agent, write(tmp_path / "part", [*cheap, *dear[1:]]))
