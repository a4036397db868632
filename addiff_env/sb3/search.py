"""Hyperparameter search with Optuna: any number of workers share one journal file, which needs no server.

    addiff search runs/sweep/tiny --trials 20 env=tiny algorithm.total_timesteps=20000

A trial is a whole training in a folder of its own. It is judged on the held-out prompts by quality less a fixed price
per evaluation (of the reward only its own price may be among what is searched, and its scales are fixed), and given up
early where it does worse than others at the same point, or where its policy collapses. A worker that was killed or
interrupted and is started again with the same ``--seed`` goes on with the training it had begun, from its checkpoint,
and runs only what is left of its ``--trials``; a training that fails again and again is left.

Configurations are composed by Hydra, as in ``train_sb3.py``; its Optuna sweeper is not used, since that pins an Optuna
without journal files. ``train_sb3.py -m seed=0,1,2`` is Hydra's own sweep, for lists of values.
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from stable_baselines3.common.callbacks import BaseCallback

from addiff_env.env.training_settings import differing_values, resolved
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.sb3.checkpoint import FILE
from addiff_env.sb3.held_out import HeldOut
from addiff_env.sb3.parts import input_settings
from addiff_env.sb3.training import COSMETIC, Result, train
from addiff_env.storage.commands import command_line, interruptible, override, spelled
from addiff_env.storage.files import claim, read_yaml
from addiff_env.storage.inputs import fingerprints

Trainer = Callable[..., Result]
HELD_OUT = 128  # prompts that a trial is judged on; the 32 of a single training are too few to tell trials apart
PRICES = ("reward.weights.efficiency",)  # of the reward, what is no part of the quality that trials are judged by
ATTEMPTS = 3  # at a training that ends with an error: what a checkpoint does not get over, the next one will not either
CONFIG, NAMED, INPUTS = "config", "named", "inputs"  # of a study's settings: see `study_inputs`
NOTHING_HELD_OUT = "a search needs held-out prompts: set prompts.held_out.source and logging.held_out_every"


def open_study(folder: Path, seed: int | None = None, settings: dict[str, Any] | None = None) -> optuna.Study:
    """The study in ``folder``, made if there is none; safe for many workers, on a network file system too.

    Raises:
        ValueError: its workers so far had other ``settings``, so that their trials do not compare. Settings that an
            earlier release did not keep are not compared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name="addiff",
        storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
        load_if_exists=True,
    )
    theirs = study.user_attrs.get("settings", settings) or {}
    if settings is not None and (differing := _differing_settings(settings, theirs)):
        raise ValueError(f"{folder} holds a search with other settings ({'; '.join(differing)}); name another folder")
    if settings is not None and "settings" not in study.user_attrs:
        study.set_user_attr("settings", settings)
    return study


def _differing_settings(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Every setting in which two workers differ, in words; the configuration and its files by their own names."""
    plain = [name for name in ours if name not in (CONFIG, INPUTS, NAMED) and ours[name] != theirs.get(name)]
    if plain or CONFIG not in theirs:
        return [f"{name}: {theirs.get(name)} there, {ours[name]} now" for name in plain]
    configs = [OmegaConf.create(settings[CONFIG]) for settings in (ours, theirs)]
    return differing_values(configs[0], configs[1], ours[INPUTS], theirs[INPUTS], ours[NAMED], COSMETIC)


def study_inputs(cfg: DictConfig, space: dict[str, Any]) -> dict[str, Any]:
    """What the trials of a search depend on beyond what is said: their configuration, and the files that it names.

    Files that a search chooses among count, too.
    """
    named = input_settings(cfg)
    choices = {entry.lstrip("+"): values for entry, values in space.items() if isinstance(values, list)}
    named |= {f"{name}[{k}]": v for name, values in choices.items() if name in named for k, v in enumerate(values)}
    kept = {name: str(value) for name, value in named.items() if isinstance(value, str)}
    return {CONFIG: resolved(cfg), NAMED: kept, INPUTS: fingerprints(kept)}


def take_over(study: optuna.Study, worker: int, folder: Path) -> int:
    """Give up what this worker did not bring to an end, and queue it again in its place below ``folder``.

    What the worker draws from now on differs from what it drew before.

    Returns:
        How many trainings it has completed.
    """
    trials = study.get_trials()
    last = {folder_name(trial): trial.number for trial in trials}  # in each place; the earlier ones were taken over
    own = [trial for trial in trials if trial.user_attrs.get("worker") == worker]
    for trial in own:
        if trial.number != last[folder_name(trial)]:
            continue
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
        if (failures := _failures(trial)) < ATTEMPTS and _was_interrupted(trial, folder):
            study.enqueue_trial(trial.params, user_attrs={"folder": folder_name(trial), "failures": failures})
    # With the old seed, the first draw of all would come again.
    seed = np.random.SeedSequence([worker, len(own)]).generate_state(1)[0]
    study.sampler = optuna.samplers.TPESampler(seed=int(seed))
    return sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in own)


def _was_interrupted(trial: optuna.trial.FrozenTrial, folder: Path) -> bool:
    """Whether a training had begun and may go on; to Optuna, Ctrl-C is a failure like any other."""
    begun = "interrupted" in trial.user_attrs or (folder / folder_name(trial) / FILE).is_file()
    return trial.state == TrialState.RUNNING or (trial.state == TrialState.FAIL and begun)


def _failures(trial: optuna.trial.FrozenTrial) -> int:
    """How often the training in this place has ended by itself without a result."""
    failed = trial.state == TrialState.FAIL and "interrupted" not in trial.user_attrs
    return trial.user_attrs.get("failures", 0) + failed


def folder_name(trial: optuna.Trial | optuna.trial.FrozenTrial) -> str:
    """Where a trial trains; one that was queued again goes on in the old place."""
    return str(trial.user_attrs.get("folder", f"trial-{trial.number:05d}"))


def refuse_unlike_judges(cfg: DictConfig, space: dict[str, Any]) -> None:
    """Trials are judged by their own reward's quality, which has to be the same one in all of them.

    Raises:
        ValueError: the scores' scales move with a training, or ``space`` has more of the reward than its price.
    """
    if cfg.reward.normalisation != "fixed":
        raise ValueError(
            f"reward.normalisation={cfg.reward.normalisation}: every trial would be judged on scales of its own; "
            "a search needs fixed ones (reward=fixed)"
        )
    groups = ("reward", "reward.normalisation", "reward.weights")
    for entry in space:
        name = entry.lstrip("+")
        if name in groups or (name.startswith("reward.weights.") and name not in PRICES):
            raise ValueError(
                f"{entry} cannot be searched: every trial would be judged by a reward of its own; "
                f"of the reward's weights only {', '.join(PRICES)} may vary"
            )


def suggest(trial: optuna.Trial, space: dict[str, Any]) -> list[str]:
    """Draw every name of ``space`` (see configs/search) and return the values as overrides.

    Raises:
        ValueError: an entry that is neither choices nor bounds; the message shows it.
    """
    return [f"{name}={spelled(_draw(trial, name, entry))}" for name, entry in space.items()]


def _draw(trial: optuna.Trial, name: str, entry: Any) -> Any:
    if isinstance(entry, list) and entry:
        return trial.suggest_categorical(name, entry)
    if not isinstance(entry, dict) or not {"low", "high"} <= set(entry) <= {"low", "high", "log", "int"}:
        raise ValueError(f"{name}: expected a list of choices or low and high (log, int), got {entry!r}")
    draw = trial.suggest_int if entry.get("int") else trial.suggest_float
    return draw(name, entry["low"], entry["high"], log=bool(entry.get("log", False)))


def objective_value(held_out: dict[str, float], price: float) -> float:
    """Held-out quality less ``price`` per evaluation.

    Raises:
        ValueError: nothing was held out, so there is nothing to judge by.
    """
    if not held_out:
        raise ValueError(NOTHING_HELD_OUT)
    return held_out["quality"] - price * held_out["nfe_mean"]


class Report(BaseCallback):
    """Tell the study how a trial does after each look at the held-out prompts; gives it up where the pruner says so."""

    def __init__(self, trial: optuna.Trial, price: float) -> None:
        super().__init__()
        self.trial, self.price, self._looks = trial, price, 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        every_callback = self.locals["callback"].callbacks  # of the list that the training runs
        held_out = next((callback for callback in every_callback if isinstance(callback, HeldOut)), None)
        if held_out is None or held_out.looks == self._looks:
            return
        self._looks = held_out.looks  # the steps of a trial that goes on continue; Optuna keeps the first of equal ones
        self.trial.report(objective_value(held_out.summary, self.price), self._looks)
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"behind the others after look {self._looks}")


def run_trial(
    trial: optuna.Trial,
    configure: Callable[[list[str]], DictConfig],
    space: dict[str, Any],
    folder: Path,
    price: float,
    trainer: Trainer = train,
    worker: int | None = None,
) -> float:
    """Train once with drawn values; returns what `objective_value` makes of it.

    Raises:
        optuna.TrialPruned: the trial was given up. ValueError: nothing is held out to judge it by.
    """
    if worker is not None:
        trial.set_user_attr("worker", worker)
    cfg = configure([*suggest(trial, space), "alarm.stop=true", "progress_bar=false"])
    if not (cfg.prompts.held_out.source and cfg.logging.held_out_every):
        raise ValueError(NOTHING_HELD_OUT)  # before hours of training
    try:
        result = trainer(cfg, folder / folder_name(trial), callbacks=[Report(trial, price)])
    except KeyboardInterrupt:
        trial.set_user_attr("interrupted", True)  # `take_over` goes on with it
        raise
    if result.collapsed:
        raise optuna.TrialPruned(f"collapsed: {result.collapsed}")
    return objective_value(result.held_out, price)


def _find_configs(folder: str) -> str:
    """The absolute path of the folder that holds train.yaml."""
    place = Path(resolve_model(folder)).absolute()
    if not (place / "train.yaml").is_file():
        raise FileNotFoundError(
            f"no train.yaml in {looked_at(folder)}; --configs names the folder of the configuration"
        )
    return str(place)


def read_space(path: str | Path) -> dict[str, Any]:
    """The search space of a YAML file, which may be named as ``addiff_env:configs/...``.

    Raises:
        FileNotFoundError: there is none; ValueError: it is no mapping.
    """
    place = Path(resolve_model(path))
    if not place.is_file():
        raise FileNotFoundError(f"no search space {looked_at(path)}; --space names a file of what may vary")
    space = read_yaml(place)
    if isinstance(space, ListConfig) or not space:
        raise ValueError(f"{path} must map names of the configuration to what they may be")
    return {str(name): value for name, value in OmegaConf.to_container(space).items()}  # type: ignore[union-attr]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; returns the exit status."""
    parser = argparse.ArgumentParser(prog="addiff search", description="One worker of a hyperparameter search.")
    parser.add_argument("folder", type=Path, help="the study's folder; workers that name the same one share the study")
    parser.add_argument(
        "--trials", type=int, default=20, help="trainings that this worker runs; 0: only say which was best"
    )
    parser.add_argument("--space", default="addiff_env:configs/search/ppo.yaml", help="file of what may vary")
    parser.add_argument("--configs", default="addiff_env:configs", help="folder of the Hydra configuration")
    parser.add_argument("--price", type=float, default=0.002, help="quality that one evaluation has to be worth")
    parser.add_argument("--seed", type=int, help="of this worker's draws, and its name: all differ")
    parser.add_argument("overrides", nargs="*", help="as for train_sb3.py, for every trial")
    options = parser.parse_intermixed_args(argv)
    if options.trials < 0:
        parser.error(f"--trials must be at least 0, got {options.trials}")
    configs = _find_configs(options.configs)

    def configure(drawn: list[str]) -> DictConfig:
        try:
            with initialize_config_dir(configs, version_base="1.3"):
                return compose("train", [f"prompts.held_out.number={HELD_OUT}", *options.overrides, *drawn])
        except HydraException as error:
            raise ValueError(str(error)) from error

    space, cfg = read_space(options.space), configure([])
    refuse_unlike_judges(cfg, space)
    settings = {"space": space, "price": options.price, "overrides": sorted(options.overrides)}
    # Two workers of one name would take each other's trainings over; of those without one there may be any number.
    name = uuid.uuid4().hex if options.seed is None else str(options.seed)
    instead = "give this one another --seed, or name another folder"
    with (
        interruptible(lambda: f"the trials so far are kept in {options.folder}"),
        claim(options.folder, f"a search's worker (--seed {options.seed})", "workers", name, instead),
    ):
        _work(options, configure, settings | study_inputs(cfg, space))
    return 0


def _work(options: argparse.Namespace, configure: Callable[[list[str]], DictConfig], settings: dict[str, Any]) -> None:
    """Run the trainings of one worker, and say which was the best so far."""
    space = settings["space"]
    study, worker = open_study(options.folder, options.seed, settings), options.seed
    left = options.trials - (0 if worker is None else take_over(study, worker, options.folder))
    if left > 0:
        study.optimize(
            lambda trial: run_trial(trial, configure, space, options.folder, options.price, worker=worker),
            n_trials=left,
        )
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    if not complete:
        print(f"none of {len(study.trials)} trials was completed")
        return
    best = study.best_trial
    print(f"best of {len(study.trials)} trials: {best.value:.4f} ({options.folder / folder_name(best)})")
    for name, value in best.params.items():
        print(f"  {command_line(override(name, value))}")
