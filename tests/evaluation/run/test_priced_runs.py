"""Whole evaluations of agents at several prices."""

import json
import sys

import pytest
from models import thrifty_agent

from addiff_env import cli
from addiff_env.evaluation.report import html
from addiff_env.evaluation.run.rows import read_rows

LITTLE = ["benchmark.name=tiny-dev", "benchmark.limit=2", "num_envs=2", "save_images=false", "metrics=[checker]"]


@pytest.fixture(scope="module")
def bundles(small_kwargs, tmp_path_factory):
    """Two training runs."""
    folders = [tmp_path_factory.mktemp("agents") / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        thrifty_agent(small_kwargs, seed=seed).save(folder)
    return [str(folder) for folder in folders]


def evaluate(monkeypatch, folder, *words):
    words = ["evaluate", *LITTLE, *words, f"hydra.run.dir={folder}"]
    monkeypatch.setattr(sys, "argv", ["addiff", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/addiff", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    try:
        return cli.main()
    except SystemExit as ended:
        return ended.code or 0


def summary(folder):
    """Method, price and mean evaluations of a run's rows."""
    rows = read_rows(folder / "rows.jsonl")
    names = dict.fromkeys((row.method, row.price) for row in rows)
    nfe = {pair: [row.nfe for row in rows if row.method == pair[0]] for pair in names}
    return {pair: sum(values) / len(values) for pair, values in nfe.items()}


def test_each_price_is_a_method_and_the_first_is_judged(bundles, tmp_path, monkeypatch, capsys):
    methods = "methods=[ddim-2,agent@.016,agent@1e-3]"
    words = [f"agent={bundles[0]}", methods, "filmstrips=1"]
    assert evaluate(monkeypatch, tmp_path, *words) == 0
    found = summary(tmp_path)
    assert found == {
        ("ddim-2", None): 2,
        ("agent@0.016", 0.016): 2,
        ("agent@0.001", 0.001): 6,
        ("agent@0.016, mask=full", None): 2,
        ("agent@0.016, continued", None): 2,
    }
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())["verdicts"]
    asked = [verdict["hypothesis"] for verdict in verdicts]
    assert asked[:4] == ["H1", "H2", "H3", "H4"] and "H2 at price 0.001" in asked
    assert "H2 at price 0.016" not in asked  # that is H2 itself
    (strip,) = (tmp_path / "filmstrips").glob("*/strip.json")
    assert [frame["nfe"] for frame in json.loads(strip.read_text())["frames"]] == [2, 2]  # at the price of the verdicts
    capsys.readouterr()
    assert html.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "agent@0.016" in page and "agent@0.001" in page
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert evaluate(monkeypatch, tmp_path, *words) == 0  # nothing is made again
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_several_agents_and_shards(bundles, tmp_path, monkeypatch):
    words = [f"agents=[{','.join(bundles)}]", "methods=[agent@.004,agent@.001]", "filmstrips=0", "shard.count=2"]
    for index in range(2):
        assert evaluate(monkeypatch, tmp_path, *words, f"shard.index={index}") == 0
    assert evaluate(monkeypatch, tmp_path, *words, "shard.merge=true") == 0
    expected = [(f"agent-s{seed}@{price}", price) for price in (0.004, 0.001) for seed in range(2)]
    assert list(summary(tmp_path))[:4] == expected
    assert list(summary(tmp_path))[4:] == [(f"agent-s0@0.004, {end}", None) for end in ("mask=full", "continued")]


@pytest.mark.parametrize(
    ("agent", "methods", "said"),
    [
        (None, "agent@.004", "no price input"),
        (0, "agent@.5", r"price must lie in price_range"),
        (0, "agent@dear", "'agent@dear'"),
    ],
)
def test_prices_that_cannot_be_played_are_refused_before_any_picture(
    bundles, tmp_path, monkeypatch, capsys, agent, methods, said
):
    bundle = "addiff_env:tiny/weights/agent" if agent is None else bundles[agent]
    assert evaluate(monkeypatch, tmp_path, f"agent={bundle}", f"methods=[ddim-2,{methods}]") != 0
    assert said in capsys.readouterr().err and not (tmp_path / "rows.jsonl").exists()
