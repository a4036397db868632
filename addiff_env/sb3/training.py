"""One training run, from its configuration to an agent; goes on from the run folder's checkpoint if there is one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecMonitor

import addiff_env
from addiff_env.agent import CALIBRATION_SHARES, Agent, describe_backbone, shareable
from addiff_env.env.baseline_cache import BaselineCache
from addiff_env.env.reward import check_undiscounted
from addiff_env.env.training_settings import (
    as_mapping,
    check_discount,
    differing_values,
    env_inputs,
    env_settings,
    held_out_prompts,
    resolved,
)
from addiff_env.env.validation import at_least, below, checked
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.sb3.callbacks import (
    Clock,
    CollapseAlarm,
    EpisodeLog,
    HeldOut,
    Judge,
    LinearSchedule,
    Progress,
    Remembering,
    RunningNormalisation,
    TargetNFE,
)
from addiff_env.sb3.checkpoint import FILE, Checkpoints, load_checkpoint, load_training_state, make_logger
from addiff_env.sb3.episodes import PromptOrder, Stage
from addiff_env.sb3.policies import ALGORITHMS, calibrate
from addiff_env.sb3.vec_env import DenoiseVecEnv, make_lanes, observation_parts
from addiff_env.storage.commands import command_line
from addiff_env.storage.files import claim, write_whole
from addiff_env.storage.inputs import fingerprints
from addiff_env.storage.paths import looked_at, resolve_model

CONFIG_FILE = "config.yaml"
WANDB_FILE = "wandb-id.txt"
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


def train(cfg: DictConfig, run: Path, judge: Judge | None = None, callbacks: Sequence[BaseCallback] = ()) -> Result:
    """Train as ``cfg`` (configs/train.yaml) says, in the folder ``run``, and write the agent bundle.

    A run that was killed goes on from its last checkpoint; a complete one is only exported again, and keeps the results
    that were recorded with the agent since.

    Args:
        cfg: the configuration.
        run: folder of configuration, checkpoint, logs and (unless ``cfg.out`` says otherwise) the agent.
        judge: further means of held-out pictures; see `HeldOut`.
        callbacks: further SB3 callbacks; they have no part in checkpoints.

    Raises:
        ValueError: the folder holds a run with another configuration; every differing value is named. Or a value that
            no training can have.
        RuntimeError: another process trains in the folder, or is to write its agent to the same ``cfg.out``.
    """
    check_numbers(cfg)
    run = Path(run)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with ExitStack() as held:
        held.enter_context(alone_in(run))
        if cfg.out and not _same_place(Path(cfg.out), run):
            held.enter_context(claim(Path(cfg.out), "a training's agent", instead="name another out"))
        return _train(cfg, run, judge, callbacks)


def _same_place(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _train(cfg: DictConfig, run: Path, judge: Judge | None, callbacks: Sequence[BaseCallback]) -> Result:
    named = input_settings(cfg)
    inputs = fingerprints(named)  # of what is there before it is read
    state = _find_state(cfg, run, named, inputs)
    set_random_seed(cfg.seed)
    with weights_and_biases(cfg, run, fresh=state is None):  # before TensorBoard's writer is made, which it has to see
        training = Training(cfg, run, judge, state, inputs)
        try:
            _settle(cfg, run, fresh=state is None)
            training.learn(callbacks)
            agent = training.bundle()
        finally:
            training.close()
    out = Path(cfg.out) if cfg.out else run / "agent"
    keep_results(agent, out)
    agent.save(out)
    return Result(agent, training.model.num_timesteps, training.collapsed, training.held_out_summary)


def input_settings(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a training that may name files which it depends on, by the names that the configuration has."""
    held_out = cfg.prompts.held_out.source
    looks = bool(held_out and cfg.logging.held_out_every)
    more = {"prompts.held_out.source": held_out if looks else None, "reward.baselines": cfg.reward.baselines}
    return {**env_inputs(cfg), **more}


def check_numbers(cfg: DictConfig) -> None:
    """Before any model is loaded; what depends on the environment is checked with it.

    Raises:
        ValueError: no seed, no decision to train for, or a target that is no number.
    """
    checked("seed", cfg.seed, Annotated[int, at_least(0), below(2**32)])  # NumPy's global stream takes no more
    total, target = cfg.algorithm.total_timesteps, cfg.reward.target_nfe
    if not (_is_number(total) and 1 <= total < float("inf")):
        raise ValueError(f"algorithm.total_timesteps must be a number of at least 1, got {total!r}")
    if target is not None and not _is_number(target):
        raise ValueError(f"reward.target_nfe must be a number of evaluations or null, got {target!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Hold the folder: two processes that write the same checkpoint would spoil it. A killed process lets go.

    Raises:
        RuntimeError: another process holds it.
    """
    with claim(run, "a training", instead=ELSEWHERE):
        yield


def keep_results(agent: Agent, folder: Path) -> None:
    """Take over what was measured of the same weights, where ``folder`` holds them already."""
    try:
        known = Agent.load(folder)
    except (FileNotFoundError, ValueError):
        return
    if known.fingerprint == agent.fingerprint and "results" in known.config:
        agent.config["results"] = known.config["results"]


class Training:
    """The parts of one run, put where ``state`` (a checkpoint) left them, or freshly calibrated without one."""

    def __init__(
        self,
        cfg: DictConfig,
        run: Path,
        judge: Judge | None,
        state: dict[str, Any] | None,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.cfg, self.run, self.fresh, self.inputs = cfg, run, state is None, inputs
        self.env = build_env(cfg)
        self.model = build_model(cfg, self.env)
        self.held_out = build_held_out(cfg, judge)
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
        return Agent(self.model.policy.export(), config)


# --------------------------------------------------------------------------- parts, from the configuration


def build_env(cfg: DictConfig) -> DenoiseVecEnv:
    """The lanes with their prompt order, curriculum and baselines.

    Raises:
        FileNotFoundError, ValueError: as `load_baselines`.
    """
    lanes = make_lanes(cfg.env.id, cfg.num_envs, **env_settings(cfg))
    baselines = load_baselines(cfg, lanes) if cfg.reward.baselines else None
    stages = [Stage(**stage) for stage in cfg.prompts.stages]
    order = PromptOrder(lanes.prompts, stages, baselines.seeds if baselines else None)
    return DenoiseVecEnv(lanes, order, baselines)


def load_baselines(cfg: DictConfig, lanes: DiffusionDenoiseVectorEnv) -> BaselineCache:
    """The configured baselines, which must cover every prompt: one without would end the run in the middle.

    Raises:
        FileNotFoundError, ValueError: as `BaselineCache.load`; a discount, or prompts without a baseline: the message
            says how many. Where something is missing, it has the command that scores it.
    """
    check_undiscounted(lanes.reward_config)
    path = Path(resolve_model(cfg.reward.baselines))
    if not path.is_file():
        raise FileNotFoundError(f"no baselines {looked_at(path)}; make them with: {_scoring_command(cfg)}")
    cache = BaselineCache.load(path, lanes)
    missing = cache.missing(lanes.prompts)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(lanes.prompts)} prompts have no baseline in {path}, e.g. {missing[0]!r}; "
            f"add them with: {_scoring_command(cfg, '--steps', str(cache.configuration['steps']))}"
        )
    return cache


def _scoring_command(cfg: DictConfig, *options: str) -> str:
    """What scores every prompt of this configuration, in its own environment."""
    kwargs = {name: value for name, value in env_settings(cfg).items() if name != "reward"}
    environment = ["--env", cfg.env.id, "--kwargs", json.dumps(kwargs)]
    return command_line("addiff", "baselines", cfg.reward.baselines, *environment, *options)


def build_model(cfg: DictConfig, env: DenoiseVecEnv) -> Any:
    """The algorithm (PPO or MaskablePPO) with the custom policy.

    Raises:
        ValueError: an unknown algorithm, or a discount that differs from the reward's.
    """
    options = as_mapping(cfg.algorithm)
    name = options.pop("name")
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm.name {name!r}; known: {', '.join(ALGORITHMS)}")
    check_discount(cfg, env.reward_config.gamma)
    lag = env.num_envs * options["n_steps"] / options.pop("total_timesteps")
    del options["ent_coef_end"], options["gae_lambda_end"]  # `Progress` follows these schedules
    options["learning_rate"] = LinearSchedule(options["learning_rate"], options.pop("learning_rate_end"), lag)
    algorithm, policy = ALGORITHMS[name]
    policy_options = {**as_mapping(cfg.policy), "parts": observation_parts(env.env)}
    return algorithm(policy, VecMonitor(env), policy_kwargs=policy_options, seed=cfg.seed, device=cfg.device, **options)


def build_held_out(cfg: DictConfig, judge: Judge | None) -> HeldOut | None:
    """The look at held-out prompts, where the configuration names some."""
    prompts = held_out_prompts(cfg)
    if not prompts:
        return None
    settings = {"batch_size": cfg.num_envs} | env_settings(cfg)  # no more at once than training takes
    lanes = make_lanes(cfg.env.id, len(prompts), **settings | {"max_episode_steps": None})  # to their ends
    return HeldOut(lanes, prompts, cfg.logging.held_out_every, cfg.logging.filmstrips, judge)


def build_callbacks(cfg: DictConfig, env: DenoiseVecEnv, held_out: HeldOut | None) -> dict[str, Remembering]:
    """The callbacks that a checkpoint remembers, by name, in the order they are called."""
    callbacks: dict[str, Remembering] = {"clock": Clock(), "log": EpisodeLog()}
    if cfg.reward.normalisation not in ("fixed", "running"):
        raise ValueError(f"unknown reward.normalisation {cfg.reward.normalisation!r}; known: fixed, running")
    if cfg.reward.normalisation == "running":
        callbacks["normalisation"] = RunningNormalisation(env)
    if cfg.reward.target_nfe is not None:
        callbacks["dual"] = TargetNFE(env, cfg.reward.target_nfe, cfg.reward.dual_rate)
    callbacks["alarm"] = CollapseAlarm(**as_mapping(cfg.alarm))
    return callbacks | ({"held_out": held_out} if held_out else {})


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
