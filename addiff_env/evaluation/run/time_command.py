"""Time a finished evaluation's methods in turns on this machine, so that seconds are a cost as net FLOPs are.

    addiff time runs/reproduce/tiny-final                   five rounds over 64 of its prompts
    addiff time runs/mine --rounds 9 --prompts 128 --batch-size 16
    addiff time runs/mine --anew                            on another machine, or with other settings

All methods of the report take turns, in random order, on the same prompts and in batches of one size; on a machine
with nothing else to do. Rounds are kept in <run folder>/timings.json, apart from the rows' own seconds: after Ctrl-C
or a kill the same command goes on. Then the verdicts are reached and the report is made again, with seconds beside net
FLOPs, and pictures a second at equal quality are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from addiff_env.agent import Agent
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.report.html import remake
from addiff_env.evaluation.report.seconds import speed_text
from addiff_env.evaluation.run.evaluation_run import EvaluationRun
from addiff_env.evaluation.run.fingerprint import CONTROL
from addiff_env.evaluation.run.machine import load_average, machine, today
from addiff_env.evaluation.run.made_with import read_fingerprint, require_same
from addiff_env.evaluation.run.row_maker import made_by
from addiff_env.evaluation.run.run_folder import read_timings, reported_rows, write_timings
from addiff_env.evaluation.run.runner import controls_of
from addiff_env.evaluation.run.timing import FAILURES, time_methods
from addiff_env.evaluation.run.version import code_version
from addiff_env.evaluation.statistics.families import control_names, run_and_price
from addiff_env.evaluation.statistics.summary import by_method
from addiff_env.evaluation.statistics.timings import Timings, describe_machine
from addiff_env.loading.paths import looked_at
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import interruptible
from addiff_env.storage.files import claim, read_yaml, told_when_full
from addiff_env.types import ResultRow

ANEW = "--anew measures everything again"


# --------------------------------------------------------------------------- what is timed


def open_run(folder: Path) -> EvaluationRun:
    """A finished evaluation, from its ``config.yaml``; raises FileNotFoundError where there is none."""
    files = RunFolder(folder)
    for path in (files.rows, files.config):
        if not path.exists():
            raise FileNotFoundError(f"no {path.name} in {looked_at(folder)}: it is no finished evaluation")
    cfg = read_yaml(files.config)
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"{files.config} is no configuration of an evaluation")
    return EvaluationRun(cfg, folder)


def make_methods(
    run: EvaluationRun, rows: Sequence[ResultRow], batch_size: int
) -> tuple[list[Method], dict[str, str], DiffusionDenoiseVectorEnv]:
    """The methods of ``rows``, in batches of one size; why others cannot be made; and the environment.

    Raises:
        ValueError: a method is not what its rows were made by (another model, policy, solver or dtype).
    """
    env = run.make_env(batch_size, batch_size=batch_size)
    controls = control_names(run.agent_name)
    methods: list[Method] = []
    failed: dict[str, str] = {}
    for name in by_method(rows):
        if name not in controls:
            try:
                methods.append(_make(run, env, name))
            except FAILURES as error:
                failed[name] = str(error)
    if wanted := set(by_method(rows)) & set(controls):
        full = run.make_env(batch_size, batch_size=batch_size, **CONTROL)
        made = controls_of(run.own_rows(rows), env, full, run.agent_name)
        methods += [method for method in made if method.name in wanted]
    _require_rows_methods(methods, rows)
    return methods, failed, env


def _make(run: EvaluationRun, env: DiffusionDenoiseVectorEnv, name: str) -> Method:
    agent: Agent | None = run.agent
    spec, label = name, "agent"
    if own := run_and_price(name):
        label, price = own
        if label not in run.agents:
            raise ValueError(f"no agent of this run is called {label!r}; known: {', '.join(run.agents)}")
        agent, spec = run.agents[label], f"agent@{price}" if price else "agent"
    made = make_method(spec, env, agent, run.options, run.benchmark, label)
    if made.name != name:
        raise ValueError(f"what is called {name!r} in the rows is now {made.name!r}")
    if isinstance(made, PolicyMethod):
        made.lanes.full_batches = True  # lanes are refilled as the pipeline does: the same pictures, in full batches
    return made


def _require_rows_methods(methods: Sequence[Method], rows: Sequence[ResultRow]) -> None:
    of = {row.method: row for row in rows}
    for method in methods:
        own = of[method.name]
        if other := {part: by for part, by in made_by(method).items() if getattr(own, part) != by}:
            words = "; ".join(f"{part} {getattr(own, part)!r}, here {by!r}" for part, by in other.items())
            raise ValueError(f"the rows of {method.name!r} were made by another method ({words}): nothing was timed")


def sample_of(run: EvaluationRun, rows: Sequence[ResultRow], number: int) -> list[Item]:
    """The first ``number`` of the run's items that every method has a row of; all where there are fewer."""
    groups = [{(row.prompt, row.seed) for row in group} for group in by_method(rows).values()]
    common = set.intersection(*groups)
    return [item for item in run.items if (item.prompt, item.seed) in common][:number]


# --------------------------------------------------------------------------- measuring


def time_run(
    folder: Path, rounds: int = 5, prompts: int = 64, batch_size: int | None = None, anew: bool = False, seed: int = 0
) -> Timings:
    """Time the methods of a finished evaluation's report, and keep the rounds in its folder as they are finished.

    Args:
        folder: of the run.
        rounds: in all; those that are there already count.
        prompts: pictures of the sample.
        batch_size: lanes, or pictures, that every method works on at once; None: the run's ``num_envs``.
        anew: measure everything again, whatever is there.
        seed: of the order of turns.

    Raises:
        FileNotFoundError: no finished evaluation. ValueError: its rows were made with other settings, models or
            policies than its configuration now stands for; or other timings are there, and not ``anew``.
    """
    run, rows = open_run(folder), reported_rows(folder)
    if run.cfg.threads:
        torch.set_num_threads(run.cfg.threads)
    for version in dict.fromkeys(row.code_version for row in rows):
        require_same(folder, run.fingerprint, version, "what made the rows is what is to be timed")
    size = batch_size or int(run.cfg.num_envs)
    items = sample_of(run, rows, prompts)
    methods, failed, env = make_methods(run, rows, size)
    fresh = Timings(
        untimed=failed,
        machine={**machine(env.backbone.device), "dtype": env.backbone.dtype_name},
        settings={"pictures": len(items), "batch_size": size, "seed": seed, "benchmark": run.cfg.benchmark.name},
        code_version=code_version(),
        made_with=read_fingerprint(folder, rows[0].code_version) or {},
    )
    kept = _kept(folder, fresh, [method.name for method in methods], anew)
    if kept.rounds >= rounds:
        return kept
    return _measure(folder, methods, items, rounds, seed, kept, env)


def _kept(folder: Path, fresh: Timings, names: Sequence[str], anew: bool) -> Timings:
    """The rounds that are there, to go on with; ``fresh`` where there are none.

    Raises:
        ValueError: they are of other methods, or measured otherwise.
    """
    found = None if anew else read_timings(folder)
    if found is None or not found.rounds:
        return fresh
    for part in ("machine", "settings", "code_version"):
        ours, theirs = getattr(fresh, part), getattr(found, part)
        if ours != theirs:
            raise ValueError(f"{folder} was timed with {part} {theirs}, this is {ours}; {ANEW}")
    if other := sorted({*names, *fresh.untimed} ^ {*found.methods, *found.untimed}):
        raise ValueError(f"{folder} was timed with other methods than it has now: {', '.join(other)}; {ANEW}")
    return found


def _measure(
    folder: Path,
    methods: Sequence[Method],
    items: Sequence[Item],
    rounds: int,
    seed: int,
    kept: Timings,
    env: DiffusionDenoiseVectorEnv,
) -> Timings:
    session = {"date": today(), "load_before": load_average()}

    def with_session(found: Timings) -> Timings:
        own = {**session, "rounds": found.rounds - kept.rounds, "load_after": load_average()}
        return replace(found, sessions=(*kept.sessions, own))

    def keep(found: Timings) -> None:
        write_timings(folder, with_session(found))
        print(f"round {found.rounds} of {rounds}: {len(found.methods)} methods", file=sys.stderr, flush=True)

    def forget_texts() -> None:
        for backbone in {id(method.backbone): method.backbone for method in methods}.values():
            backbone.forget_prompts()
        env.perception.forget_texts()

    size = kept.settings["batch_size"]
    found = time_methods(
        methods, items, rounds, warm_up=size, seed=seed, before=forget_texts, kept=replace(kept, sessions=()), keep=keep
    )
    there = read_timings(folder)
    if not found.methods and there is not None and there.rounds:  # a device that is gone is no reason to forget them
        why = "; ".join(f"{name}: {reason}" for name, reason in found.untimed.items())
        raise ValueError(f"nothing can be timed any more; {there.rounds} rounds are kept in {folder} ({why})")
    found = with_session(found)
    write_timings(folder, found)
    return found


# --------------------------------------------------------------------------- the command


def _kept_rounds(folder: Path) -> str:
    found = read_timings(folder)
    return f"{found.rounds if found else 0} rounds are kept in {RunFolder(folder).timings}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff time", description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="run folder of addiff evaluate")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="in all; those that are kept count (5)")
    parser.add_argument("--prompts", type=at_least_one, default=64, help="pictures that each method makes a round (64)")
    parser.add_argument("--batch-size", type=at_least_one, help="lanes or pictures of a batch (the run's num_envs)")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which methods take turns (0)")
    parser.add_argument("--anew", action="store_true", help="measure everything again, whatever is kept")
    told = parser.parse_args(argv)
    open_run(told.run)  # before the folder is claimed, and made where there is none
    with claim(told.run, "addiff time"), told_when_full(told.run), interruptible(lambda: _kept_rounds(told.run)):
        timings = time_run(told.run, told.rounds, told.prompts, told.batch_size, told.anew, told.seed)
        written = remake(told.run, decide=True)
    print(f"\n{describe_machine(timings)}")
    print(speed_text(told.run))
    for path in (RunFolder(told.run).timings, *written):
        print(path)
    return 0
