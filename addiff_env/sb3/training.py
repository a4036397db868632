"""One training run, from its configuration to an agent; goes on from the run folder's checkpoint if there is one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.utils import set_random_seed

import addiff_env
from addiff_env.agent import CALIBRATION_SHARES, Agent, describe_backbone, shareable
from addiff_env.env.training_settings import (
    as_mapping,
    differing_values,
    env_settings,
    resolved,
)
from addiff_env.sb3.callbacks import (
    Clock,
    CollapseAlarm,
    EpisodeLog,
    LinearSchedule,
    Progress,
)
from addiff_env.sb3.checkpoint import FILE, Checkpoints, load_checkpoint, load_training_state, make_logger
from addiff_env.sb3.held_out import MetricFn
from addiff_env.sb3.parts import build_callbacks, build_env, build_held_out, build_model, check_settings, input_settings
from addiff_env.sb3.policies import calibrate
from addiff_env.sb3.vec_env import observation_parts
from addiff_env.storage.files import claim, told_when_full, write_whole
from addiff_env.storage.inputs import fingerprints

CONFIG_FILE = "config.yaml"
WANDB_FILE = "wandb-id.txt"
MEASURED = ("results", "prices")  # of a bundle, what is measured after the training
HYDRA = ".hydra"  # folder of what Hydra made the configuration of
ELSEWHERE = "name another hydra.run.dir"
COSMETIC = ("progress_bar", "threads", "out", "resume", "logging")  # may differ between a run and its continuation


@dataclass
class Result:
    """How a training ended."""

    agent: Agent
    timesteps: int
    collapsed: str | None  # the alarm's words, where it stopped the training
    held_out: dict[str, float] = field(default_factory=dict)  # means of the last look


def train(cfg: DictConfig, run: Path, metric: MetricFn | None = None, callbacks: Sequence[BaseCallback] = ()) -> Result:
    """Train as ``cfg`` (configs/train.yaml) says, in the folder ``run``, and write the agent bundle.

    A run that was killed goes on from its last checkpoint; a complete one is only exported again, and keeps the results
    that were recorded with the agent since.

    Args:
        cfg: the configuration.
        run: folder of configuration, checkpoint, logs and (unless ``cfg.out`` says otherwise) the agent.
        metric: further means of held-out pictures; see `HeldOut`.
        callbacks: further SB3 callbacks; they have no part in checkpoints.

    Raises:
        ValueError: the folder holds a run with another configuration; every differing value is named. Or a value that
            no training can have.
        FolderBusyError: another process trains in the folder, or is to write its agent to the same ``cfg.out``.
    """
    check_settings(cfg)
    run = Path(run).expanduser()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with ExitStack() as held:
        held.enter_context(claim(run, "a training", instead=ELSEWHERE))
        if cfg.out and not _same_place(Path(cfg.out).expanduser(), run):
            held.enter_context(claim(Path(cfg.out).expanduser(), "a training's agent", instead="name another out"))
        held.enter_context(told_when_full(run))
        return _train(cfg, run, metric, callbacks)


def _same_place(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _train(cfg: DictConfig, run: Path, metric: MetricFn | None, callbacks: Sequence[BaseCallback]) -> Result:
    named = input_settings(cfg)
    inputs = fingerprints(named)  # of what is there before it is read
    state = _find_state(cfg, run, named, inputs)
    set_random_seed(cfg.seed)
    with weights_and_biases(cfg, run, fresh=state is None):  # before TensorBoard's writer is made, which it has to see
        training = Training(cfg, run, metric, state, inputs)
        try:
            _settle(cfg, run, fresh=state is None)
            training.learn(callbacks)
            agent = training.bundle()
        finally:
            training.close()
    out = Path(cfg.out).expanduser() if cfg.out else run / "agent"
    keep_results(agent, out)
    agent.save(out)
    return Result(agent, training.model.num_timesteps, training.collapsed, training.held_out_summary)


def keep_results(agent: Agent, folder: Path) -> None:
    """Take over what was measured of the same weights, where ``folder`` holds them already."""
    try:
        known = Agent.load(folder)
    except (FileNotFoundError, ValueError):
        return
    if known.fingerprint == agent.fingerprint:
        agent.config |= {name: known.config[name] for name in MEASURED if name in known.config}


class Training:
    """The parts of one run, put where ``state`` (a checkpoint) left them, or freshly calibrated without one."""

    def __init__(
        self,
        cfg: DictConfig,
        run: Path,
        metric: MetricFn | None,
        state: dict[str, Any] | None,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.cfg, self.run, self.fresh, self.inputs = cfg, run, state is None, inputs
        self.env = build_env(cfg)
        self.model = build_model(cfg, self.env)
        self.held_out = build_held_out(cfg, metric)
        self.remembered = build_callbacks(cfg, self.env, self.held_out)
        self.model.set_logger(make_logger(run, list(cfg.logging.formats), state["num_timesteps"] if state else 0))
        try:
            self._begin(state)
        except BaseException:
            self.close()
            raise

    def _begin(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            load_training_state(state, self.model, self.env, self.remembered)
            return
        self.env.order.progress = 1.0  # the statistics are those of every stage's prompts
        calibrate(self.model, self.cfg.calibration_steps, CALIBRATION_SHARES, self.cfg.seed)
        self.env.order.progress = 0.0

    def learn(self, further: Sequence[BaseCallback] = ()) -> None:
        """Train to the end."""
        algorithm, done = self.cfg.algorithm, self.model.num_timesteps
        if done >= algorithm.total_timesteps or self.collapsed:
            return
        entropy = LinearSchedule(algorithm.ent_coef, algorithm.ent_coef_end)
        gae_lambda = LinearSchedule(algorithm.gae_lambda, algorithm.gae_lambda_end)
        config = resolved(self.cfg)
        callbacks = [
            Progress(self.env, algorithm.total_timesteps, entropy, gae_lambda),
            *self.remembered.values(),
            *further,
            Checkpoints(self.run / FILE, self.env, self.remembered, config, self.cfg.checkpoint_every, self.inputs),
        ]
        self.model.learn(
            algorithm.total_timesteps - done,
            callback=CallbackList(callbacks),
            reset_num_timesteps=self.fresh,  # which also starts every lane
            progress_bar=self.cfg.progress_bar,
        )

    def close(self) -> None:
        """Close the logs and let go of the models."""
        self.model.logger.close()
        self.env.close()
        if self.held_out:
            self.held_out.lanes.close()

    @property
    def collapsed(self) -> str | None:
        """Why the alarm ended the training, if it did."""
        alarm = self.remembered["alarm"]
        assert isinstance(alarm, CollapseAlarm)
        return alarm.collapsed if alarm.stop else None

    @property
    def held_out_summary(self) -> dict[str, float]:
        """Means of the last look at held-out prompts; empty without any."""
        return dict(self.held_out.summary) if self.held_out else {}

    def bundle(self) -> Agent:
        """The trained actor with what it was trained on and how it did in the last rollout."""
        log, clock, lanes = self.remembered["log"], self.remembered["clock"], self.env.env
        assert isinstance(log, EpisodeLog) and isinstance(clock, Clock)
        config: dict[str, Any] = {
            "env": {"id": self.cfg.env.id, "kwargs": shareable(env_settings(self.cfg))},
            "observation": observation_parts(lanes),
            "hidden": self.cfg.policy.hidden,
            "backbone": describe_backbone(lanes),
            "reward": dict(vars(lanes.reward_config)),
            "training": {
                "seed": self.cfg.seed,
                "timesteps": self.model.num_timesteps,
                "seconds": round(clock.seconds, 1),
                "release": addiff_env.__version__,
                "algorithm": as_mapping(self.cfg.algorithm),
                "last_rollout": {name: round(value, 4) for name, value in log.summary.items()},
                "held_out": {name: round(value, 4) for name, value in self.held_out_summary.items()},
            },
        }
        if self.cfg.attempts.folder is not None:
            record = {"contents": self.inputs.get("attempts.folder")}
            record |= {name: self.cfg.attempts[name] for name in ("number", "jitter")}
            config["training"]["attempts"] = record
        return Agent(self.model.policy.export(), config)


@contextmanager
def weights_and_biases(cfg: DictConfig, run: Path, fresh: bool = True) -> Iterator[None]:
    """Mirror TensorBoard to Weights & Biases while open, where ``logging.wandb`` (arguments of ``wandb.init``) is set.

    A run that goes on is the same run there; a ``fresh`` one is a new one, whatever the folder held before.

    Raises:
        ImportError: wandb is not installed; ValueError: an argument that is not free.
    """
    if not cfg.logging.wandb:
        yield
        return
    asked = as_mapping(cfg.logging.wandb)
    for name in ("config", "sync_tensorboard"):
        if name in asked:
            raise ValueError(f"logging.wandb.{name}={asked[name]!r}: the training itself sets {name}; leave it out")
    try:
        import wandb
    except ImportError as error:
        raise ImportError("logging=wandb needs: pip install wandb") from error
    options = {"id": _wandb_id(run, fresh), "dir": str(run), "resume": "allow"} | asked
    with wandb.init(sync_tensorboard=True, config=as_mapping(cfg), **options):
        yield


def _wandb_id(run: Path, fresh: bool) -> str:
    path = run / WANDB_FILE
    if fresh or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()


# --------------------------------------------------------------------------- run folder


def _find_state(
    cfg: DictConfig, run: Path, named: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any] | None:
    """The run folder's checkpoint, if it is to be gone on from, and is one of this configuration and its files."""
    path = run / FILE
    state = load_checkpoint(path) if cfg.resume and path.is_file() else None
    if state is not None:
        theirs, known = OmegaConf.create(state["config"]), state.get("inputs", {})  # earlier releases kept none
        assert isinstance(theirs, DictConfig)
        if values := differing_values(cfg, theirs, inputs, known, named, COSMETIC):
            raise ValueError(
                f"{run} holds a run with another configuration ({'; '.join(values)}); "
                "name another folder (hydra.run.dir=...) or start anew (resume=false)"
            )
    return state


def describe_kept(run: Path) -> str:
    """What a run folder's checkpoint holds, in words."""
    path = run / FILE
    if not path.is_file():
        return f"no checkpoint yet in {run}"
    return f"{path} holds the training as it was after {load_checkpoint(path)['num_timesteps']} decisions"


def _settle(cfg: DictConfig, run: Path, fresh: bool) -> None:
    """Give the folder to a training that was built: what cannot even begin leaves an older run there as it was."""
    if fresh:
        (run / FILE).unlink(missing_ok=True)
    write_whole(run / CONFIG_FILE, resolved(cfg))
    if HydraConfig.initialized() and _same_place(Path(HydraConfig.get().runtime.output_dir), run):
        _keep_overrides(cfg, run / HYDRA)


def _keep_overrides(cfg: DictConfig, folder: Path) -> None:
    """What Hydra itself would leave as soon as it is called, in a folder where another training may be at work."""
    folder.mkdir(exist_ok=True)
    kept = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    for name, part in kept.items():
        write_whole(folder / f"{name}.yaml", OmegaConf.to_yaml(part))
