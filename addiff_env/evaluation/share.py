"""Write what was measured into an agent's bundle, and put it on the Hugging Face Hub.

    addiff share runs/train/tiny-seed0/agent --evaluation runs/mine --card
    addiff share runs/train/tiny-seed0/agent --evaluation runs/mine --push someone/my-agent

``--evaluation`` names run folders of `evaluate.py`: the agent's own rows in them become ``results`` in its
``agent.json`` and the table of its model card. Pushing needs ``hf auth login`` once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from addiff_env.agent import Agent
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.run.rows import read_rows
from addiff_env.evaluation.statistics.families import agent_runs
from addiff_env.evaluation.statistics.summary import score_value
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.stats import clustered_wilson
from addiff_env.storage.files import claim, read_yaml
from addiff_env.storage.jsonl import read_objects
from addiff_env.types import ResultRow


def measured(agent: Agent, folder: Path) -> dict[str, dict[str, float]]:
    """What ``folder``, a run of `evaluate.py`, says about ``agent``, by its benchmark: ``tiny-test``.

    Of an agent with a price input by benchmark and price, ``tiny-test, price 0.004``.

    Raises:
        FileNotFoundError: no such run, or one that has not come to its report.
        ValueError: it holds no rows of this agent, not all, or rows that do not belong together; or the agent's
            environment was altered.
    """
    run = RunFolder(folder)
    for path in (run.rows, run.config, run.items):
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path.name} in {looked_at(folder)}: --evaluation wants a finished run of evaluate.py"
            )
    rows = [row for row in read_rows(run.rows) if row.policy == agent.fingerprint]
    rows = [row for row in rows if agent_runs([row.method])]  # one of several is named after its training seed
    if not rows:
        raise ValueError(f"{run.rows} has no rows of agent {agent.fingerprint}: evaluate this one")
    kinds = sorted({(row.code_version, row.dtype, row.backbone, row.solver) for row in rows})
    if len(kinds) > 1:
        raise ValueError(f"{run.rows} mixes measurements of this agent: {kinds}")
    pictures = len(read_objects(run.items))
    groups = {price: [row for row in rows if row.price == price] for price in dict.fromkeys(row.price for row in rows)}
    for group in groups.values():
        if len(group) != pictures:
            of = f"pictures of {group[0].method} ({agent.fingerprint})"
            raise ValueError(f"{folder} has {len(group)} of {pictures} {of}: finish it")
    cfg = read_yaml(run.config)
    if altered := OmegaConf.to_container(cfg.env):
        raise ValueError(f"{folder} was made in another environment than the agent's own: {altered}")
    name = str(cfg.benchmark.name)
    return {name if price is None else f"{name}, price {price!r}": _numbers(group) for price, group in groups.items()}


def _numbers(rows: Sequence[ResultRow]) -> dict[str, float]:
    """Means over pictures; a share of successes has its 95% Wilson interval."""
    metrics = [name for name in rows[0].scores if all(score_value(row, name) is not None for row in rows)]
    numbers = {name: float(np.mean([row.scores[name] for row in rows])) for name in metrics}
    if "success" in numbers:
        low, high = clustered_wilson([row.scores["success"] for row in rows], [row.prompt for row in rows])
        numbers |= {"success_95_low": low, "success_95_high": high}
    nfe = np.array([row.nfe for row in rows])
    gflops = float(np.mean([row.net_flops for row in rows])) / 1e9
    numbers |= {"pictures": len(rows), "nfe": float(nfe.mean()), "nfe_std": float(nfe.std()), "net_gflops": gflops}
    return {name: round(value, 4) for name, value in numbers.items()}


def record(folder: Path, evaluations: Sequence[Path]) -> Agent:
    """Write the results of ``evaluations`` into the bundle in ``folder``; returns the agent.

    Raises:
        FileNotFoundError, ValueError: as `Agent.load` and `measured`; nothing is written then.
        FolderBusyError: another process writes the bundle.
    """
    folder = Path(resolve_model(folder))
    agent = Agent.load(folder)
    found = {name: numbers for evaluation in evaluations for name, numbers in measured(agent, evaluation).items()}
    if found:
        with claim(folder, "share"):
            agent = Agent.load(folder)  # another process may have recorded something meanwhile
            agent.config["results"] = agent.config.get("results", {}) | found
            agent.save(folder)
    return agent


def main(argv: Sequence[str] | None = None) -> int:
    """Record and push; returns the exit status."""
    parser = argparse.ArgumentParser(prog="addiff share", description="Record results, share an agent.")
    parser.add_argument("agent", type=Path, help="folder of an agent bundle")
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[], help="run folders of evaluate.py")
    parser.add_argument("--card", action="store_true", help="print the model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository on the Hub, made if there is none")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    options = parser.parse_args(argv)
    agent = record(options.agent, options.evaluation)
    if options.card:
        print(agent.model_card(options.push or "owner/name"))
    if options.push:
        print(agent.push_to_hub(options.push, private=options.private or None))
    return 0
