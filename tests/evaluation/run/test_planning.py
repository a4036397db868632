"""What a run consists of: methods by name, agents by seed, and the settings that a folder's rows are held to."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.diffusers_methods import MethodOptions
from addiff_env.evaluation.methods.registry import AUTO, known_methods, make_method
from addiff_env.evaluation.run.fingerprint import run_fingerprint
from addiff_env.evaluation.run.made_with import keep_fingerprint, require_same
from addiff_env.evaluation.run.planning import (
    ALL,
    all_methods,
    asked_methods,
    expected_methods,
    keep_plan,
    named_agents,
    plan,
)
from addiff_env.evaluation.run.version import model_revision
from addiff_env.evaluation.statistics.decide import decide
from addiff_env.evaluation.statistics.decision import Rules
from addiff_env.evaluation.statistics.families import control_names
from addiff_env.storage.files import keep_first, write_whole
from addiff_env.types import ResultRow

ITEMS = [Item("a red circle", 3, "colors"), Item("a star above a green ring", 4, "position")]
CONTROLS = ("agent, mask=full", "agent, continued")


def make_agent(seed: int | None = 0, **kwargs: Any) -> Agent:
    config: dict[str, Any] = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": kwargs}, "hidden": 4}
    training = {} if seed is None else {"seed": seed}
    return Agent(PolicyNet({"x": 1}, 4), config | {"observation": {"x": 1}, "training": training})


AGENT, OTHER = make_agent(), make_agent(1)


def stamp(agents: dict[str, Agent] | None = None, **changes: Any) -> dict[str, Any]:
    values = {
        "overrides": {},
        "metrics": ["checker", "clipscore:addiff_env:tiny/weights/clip"],
        "benchmark": ITEMS,
        "options": MethodOptions(),
    }
    return run_fingerprint(agents or {"agent": AGENT}, **values | changes)


# ------------------------------------------------------------------ settings of a folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"overrides": {"guidance_scale": 7}}, "environment.guidance_scale: 4.0 there, 7 now"),
        (
            {"overrides": {"mask": "grid", "renoise": 0.5}},
            "mask: neglected_token there, grid now; .*renoise: 0.85",
        ),
        ({"overrides": {"max_nfe": 9}}, "environment.max_nfe: 32 there, 9 now"),
        ({"overrides": {"finish_steps": 0}}, "environment.finish_steps: 2 there, 0 now"),
        ({"overrides": {"height": 32}}, "environment.height: 64 there, 32 now"),
        ({"overrides": {"eta": 0.5}}, "environment.eta: 0.0 there, 0.5 now"),
        ({"metrics": ["clipscore:addiff_env:tiny/weights/dino"]}, "metrics.clipscore: .*weights/clip there, .*dino"),
        ({"metrics": ["hpsv2.1"]}, "metrics.hpsv2.1: nothing there, hpsv2.1 now"),
        ({"benchmark": ITEMS[:1]}, "benchmark.pictures: 2 there, 1 now; benchmark.id_list_sha256: "),
        ({"benchmark": [ITEMS[0], replace(ITEMS[1], seed=5)]}, "benchmark.id_list_sha256: "),
        ({"options": MethodOptions(lcm_guidance=2.0)}, "method_options.lcm_guidance: 1.0 there, 2.0 now"),
        ({"agents": {"agent": OTHER}}, "agent: .* there, .* now; agents.agent: "),
    ],
)
def test_other_settings_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    require_same(tmp_path, stamp(**changes), "1")  # a run that came to nothing leaves nothing to agree with
    keep_fingerprint(tmp_path, stamp(), "1")
    for held in (keep_fingerprint, require_same):
        with pytest.raises(ValueError, match=f"{words}.*hydra.run.dir"):
            held(tmp_path, stamp(**changes), "1")
    keep_fingerprint(tmp_path, stamp(**changes), "2")  # rows of other code are never taken for ours
    require_same(tmp_path, stamp(), "1")


def test_what_changes_no_row_may_change(tmp_path: Path) -> None:
    keep_fingerprint(tmp_path, stamp(), "1")
    require_same(tmp_path, stamp(overrides={"dtype": "float32", "batch_size": 3, "reward": {"efficiency": 0.1}}), "1")
    require_same(tmp_path, stamp(metrics=["checker"]), "1")  # rows have more
    require_same(tmp_path, stamp({"agent": AGENT, "agent-s1": OTHER}), "1")  # another method


@pytest.mark.parametrize("name", ["reads", "text_info", "negative_prompt", "look_precision", "price_range", "eta"])
def test_a_folder_of_a_release_without_a_setting_has_its_default(tmp_path: Path, name: str) -> None:
    earlier, other = stamp(), {"reads": ["reward"], "text_info": True, "look_precision": "float32", "eta": 0.5}
    earlier["environment"].pop(name, None)
    keep_fingerprint(tmp_path, earlier, "1")
    require_same(tmp_path, stamp(), "1")
    require_same(tmp_path, earlier, "1")
    if name in other:
        with pytest.raises(ValueError, match=f"environment.{name}: "):
            require_same(tmp_path, stamp(overrides={name: other[name]}), "1")


def test_agents_of_one_run_share_an_environment() -> None:
    with pytest.raises(ValueError, match="agent-s0 and agent-s1 act in .*guidance_scale: 4.0 there, 7.5 now"):
        stamp({"agent-s0": AGENT, "agent-s1": make_agent(1, guidance_scale=7.5)})


def test_of_processes_that_start_together_the_first_is_believed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from addiff_env.storage.files import keep_first\n"
        "print('ready', flush=True); sys.stdin.readline(); keep_first(Path(sys.argv[1]), sys.argv[2] * 1_000_000)"
    )
    path, root = tmp_path / "stamp.json", Path(__file__).parents[3]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    started = [subprocess.Popen([sys.executable, "-c", code, str(path), letter], **pipes) for letter in "ab"]
    assert all(process.stdout.readline() == "ready\n" for process in started)
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate() and process.returncode for process in started] == [0, 0]
    assert path.read_text() in ("a" * 1_000_000, "b" * 1_000_000)
    kept = path.read_text()
    keep_first(path, "c")
    assert path.read_text() == kept
    write_whole(path, "d")
    assert path.read_text() == "d" and [other.name for other in tmp_path.iterdir()] == ["stamp.json"]


def test_a_model_of_the_hub_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, folder = "5e8c" * 10, tmp_path / "models--owner--model"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "model_index.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert model_revision("owner/model", None) == commit == model_revision("owner/model", "main")
    assert model_revision("owner/model", commit) == commit
    assert model_revision("owner/other", None) == "unknown" and model_revision("owner/other", "v2") == "v2"
    assert model_revision("addiff_env:tiny/weights/pipeline", None) == "packaged"
    assert model_revision(str(tmp_path), None) == "local"


# ------------------------------------------------------------------ agents


def test_several_agents_are_named_by_their_training_seeds(tmp_path: Path) -> None:
    for name, agent in (("a", make_agent(3)), ("b", make_agent(5)), ("c", make_agent(3)), ("d", make_agent(None))):
        agent.save(tmp_path / name)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert list(named_agents(a, [])) == list(named_agents("/nowhere", [b])) == ["agent"]
    assert list(named_agents("/nowhere", [b, a])) == ["agent-s5", "agent-s3"]
    with pytest.raises(ValueError, match="/c' is the second of 3"):
        named_agents(a, [a, b, c])
    with pytest.raises(ValueError, match="/d' does not say"):
        named_agents(a, [a, d])
    with pytest.raises(ValueError, match="named twice"):
        named_agents(a, [a, a])


UNTIMED = [f"{name} at equal seconds" for name in ("H2", "H2+", "H5")]


def test_a_group_of_agents_is_judged_as_one_and_h4_by_the_first() -> None:
    rng, items = np.random.default_rng(0), [Item(f"prompt {k}", k, "colors", num_requirements=k % 3) for k in range(40)]
    agents, controls = ["agent-s3", "agent-s5"], list(control_names("agent-s3"))
    assert controls == ["agent-s3, mask=full", "agent-s3, continued"]
    spent = {"ddim-5": 5, "ddim-50": 50, "agent-s3": 8, "agent-s5": 16, **dict.fromkeys(controls, 8)}
    rows = [
        ResultRow(name, item.prompt, item.seed, "colors", "b", "ddim-10", name, "float32", "1",
                  actions=[0, 2, 1] if "agent" in name else [], nfe=nfe + item.num_requirements, net_flops=float(nfe),
                  scores={"success": float(rng.random() < 0.8)})
        for name, nfe in spent.items()
        for item in items
    ]  # fmt: skip
    num_requirements = {(item.prompt, item.seed): item.num_requirements for item in items}
    verdicts = decide(rows, num_requirements, Rules(draws=200), agents)  # agent-s5 spends twice what the controls do
    assert [verdict.hypothesis for verdict in verdicts] == ["H1", "H2", "H3", "H4", "H2+", "H4+", "H5", *UNTIMED]
    parts = {verdict.hypothesis: [part.condition for part in verdict.parts] for verdict in verdicts}
    assert parts["H4"] == ["better than agent-s3, continued at equal NFE"]
    assert parts["H4+"] == ["better than agent-s3, mask=full at equal NFE"]


def test_quality_at_equal_compute_is_decided_at_every_price() -> None:
    """Each price as if the agent had been run at it alone; everything else at the first."""
    rng, keys = np.random.default_rng(0), [(f"prompt {k}", k) for k in range(40)]
    spent = {"ddim-5": 5, "ddim-20": 20, "agent@0.004": 8, "agent@0.001": 12}
    worth = {"ddim-5": 0.5, "ddim-20": 0.6, "agent@0.004": 0.98, "agent@0.001": 0.55}
    rows = [
        ResultRow(name, prompt, seed, "colors", "b", "ddim-10", name, "float32", "1", actions=[0], nfe=nfe,
                  net_flops=float(nfe), scores={"success": float(rng.random() < worth[name])})
        for name, nfe in spent.items()
        for prompt, seed in keys
    ]  # fmt: skip
    requirements, rules = {key: key[1] % 3 for key in keys}, Rules(draws=200)
    first, second = "agent@0.004", "agent@0.001"
    found = {one.hypothesis: one for one in decide(rows, requirements, rules, [first])}
    assert list(found) == ["H1", "H2", "H3", "H4", "H2+", "H4+", "H5", "H2 at price 0.001", *UNTIMED]
    for name, of in (("H2", first), ("H2 at price 0.001", second)):
        alone = [row for row in rows if row.method not in {first, second} - {of}]
        assert found[name].parts == decide(alone, requirements, rules, [of])[1].parts
    assert found["H2"].parts[0].estimate > 0.2 > found["H2 at price 0.001"].parts[0].estimate


# ------------------------------------------------------------------ methods


def named(name: str) -> Any:
    return SimpleNamespace(name=name)


def test_what_needs_no_tuning_is_made_before_anything_is_tuned() -> None:
    calls: list[str] = []

    def make(spec: str) -> list[Any]:
        calls.append(spec)
        if spec == "lcm-4":
            raise FileNotFoundError("no LoRA")
        if spec == "dimm-5":
            raise ValueError("cannot make the method 'dimm-5'")
        return [named(spec)]

    def tuned(specs: Any) -> list[str]:
        calls.append("tuning")
        return ["threshold:5:0.5", "ddim-5"][: len(specs)]

    found = plan(["threshold:auto", "ddim-5", "best-of-auto"], make, tuned)
    assert calls == ["ddim-5", "tuning", "threshold:5:0.5", "ddim-5"]
    assert [method.name for method in found.methods] == ["threshold:5:0.5", "ddim-5"]  # in the order asked for, once
    for wrong, error in (("lcm-4", FileNotFoundError), ("dimm-5", ValueError)):
        calls.clear()
        with pytest.raises(error, match=wrong):
            plan(["threshold:auto", wrong], make, tuned)
        assert "tuning" not in calls
    assert plan(["lcm-4", "ddim-5"], make, tuned, ["lcm-4"]).left_out == {"lcm-4": "no LoRA"}


def test_a_merge_expects_what_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no process was asked for agent"):
        expected_methods(tmp_path, ["agent"], CONTROLS)

    def make(spec: str) -> list[Any]:
        if spec == "lcm-4":
            raise FileNotFoundError("no LoRA")
        return [named("agent-s0"), named("agent-s1")] if spec == "agent" else [named(spec)]

    asked = ["ddim-5", "words-auto", "lcm-4", "agent"]
    keep_plan(tmp_path, asked, plan(asked, make, lambda specs: ["words-8.6"], ["lcm-4"]))
    agents = ["agent-s0", "agent-s1"]
    assert expected_methods(tmp_path, asked, CONTROLS) == ["ddim-5", "words-8.6", *agents, *CONTROLS]
    assert expected_methods(tmp_path, asked, ()) == ["ddim-5", "words-8.6", *agents]
    assert expected_methods(tmp_path, ["ddim-5"], CONTROLS) == ["ddim-5"]
    keep_plan(tmp_path, ALL, plan(["ddim-5", "euler-5"], make, lambda specs: []))  # a later run adds methods
    assert expected_methods(tmp_path, ALL, CONTROLS) == ["ddim-5", "euler-5"]
    assert expected_methods(tmp_path, [*asked, "euler-5"], ())[-1] == "euler-5"
    with pytest.raises(ValueError, match="no process was asked for ddim-6"):
        expected_methods(tmp_path, ["ddim-5", "ddim-6"], CONTROLS)
    assert set(json.loads((tmp_path / "methods.json").read_text())["left_out"]) == {"lcm-4"}


@pytest.fixture(scope="module")
def env(small_kwargs: dict[str, Any]) -> Any:
    return gym.make_vec("AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs).unwrapped


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
def test_all_is_every_method_that_applies(env: Any) -> None:
    names = asked_methods(ALL, env, MethodOptions(), True)
    assert names == all_methods(env, MethodOptions(), True) and len(set(names)) == len(names)
    for name in names:
        if name != "agent" and name not in AUTO:
            assert make_method(name, env, benchmark=ITEMS).name == name
    kinds = {name.partition(":")[0].rstrip("0123456789").removesuffix("-N") for name in names}
    assert {"sag-", "attend-and-excite-", "pndm-", "unipc-", "best-of-", "oracle-stop", "agent"} <= kinds
    assert set(AUTO) <= set(names) and not set(AUTO) & set(all_methods(env, MethodOptions(), False))
    assert not any(name.startswith(("lcm", "sdxl-turbo")) for name in names)  # published for other models
    assert "lcm-4" in all_methods(env, MethodOptions(lcm_lora="some.safetensors"), True)
    assert set(AUTO) <= set(known_methods())


def test_methods_are_named_once_or_all(env: Any) -> None:
    with pytest.raises(ValueError, match="list of names or 'all', got 'ddim-5'"):
        asked_methods("ddim-5", env, MethodOptions(), True)
    with pytest.raises(ValueError, match="more than once: ddim-5"):
        asked_methods(["ddim-5", "agent", "ddim-5"], env, MethodOptions(), True)
