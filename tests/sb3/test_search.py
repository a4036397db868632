"""The hyperparameter search: spaces, pruning of the collapsed, workers that share a journal."""

from functools import partial
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stable_baselines3.common.callbacks import CallbackList

optuna = pytest.importorskip("optuna", reason="pip install 'addiff-env[search]'")

import addiff_env.storage.hydra_app  # noqa: E402, F401  # names the folders of a sweep
from addiff_env.sb3 import search  # noqa: E402
from addiff_env.sb3.checkpoint import FILE  # noqa: E402
from addiff_env.sb3.held_out import HeldOut  # noqa: E402
from addiff_env.sb3.training import Result  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs"
SPACE = {
    "algorithm.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "algorithm.n_epochs": {"low": 2, "high": 5, "int": True},
    "policy.hidden": [64, 128],
}
DONE = Result(None, 100, None, {"quality": 1.0, "nfe_mean": 10.0})


def configure(overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides)


def trainer(cfg, folder, callbacks=()):
    """Stands in for a training: best at a learning rate of 1e-3; one width always collapses."""
    if cfg.policy.hidden == 64:
        return Result(None, 0, "100% of the decisions were 'continue'", {})
    quality = 1 - abs(cfg.algorithm.learning_rate - 1e-3)
    return Result(None, 100, None, {"quality": quality, "nfe_mean": 10.0})


def optimise(folder, trials, seed=0):
    study = search.open_study(folder, seed)
    study.optimize(lambda trial: search.run_trial(trial, configure, SPACE, folder, 0.002, trainer), n_trials=trials)
    return study


@pytest.fixture(autouse=True)
def _quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_collapsed_runs_are_pruned_and_the_rest_judged(tmp_path):
    study = optimise(tmp_path, 12)
    for trial in study.trials:
        assert 1e-4 <= trial.params["algorithm.learning_rate"] <= 1e-2
        assert trial.params["algorithm.n_epochs"] in (2, 3, 4, 5)
        if trial.params["policy.hidden"] == 64:
            assert trial.state.name == "PRUNED"
        else:
            expected = 1 - abs(trial.params["algorithm.learning_rate"] - 1e-3) - 0.02
            assert trial.value == pytest.approx(expected)
    assert {trial.state.name for trial in study.trials} == {"PRUNED", "COMPLETE"}


def test_workers_share_a_study_through_its_journal(tmp_path):
    optimise(tmp_path, 3, seed=0)
    again = optimise(tmp_path, 2, seed=1)
    assert [trial.number for trial in again.trials] == [0, 1, 2, 3, 4]
    assert len(search.open_study(tmp_path).trials) == 5


def test_the_alarm_stops_collapsed_trials(tmp_path):
    seen = []
    search.open_study(tmp_path).optimize(
        lambda trial: search.run_trial(
            trial,
            configure,
            SPACE,
            tmp_path,
            0.0,
            lambda cfg, folder, **_: seen.append((cfg, folder)) or trainer(cfg, folder),
        ),
        n_trials=1,
    )
    ((cfg, folder),) = seen
    assert cfg.alarm.stop is True and folder == tmp_path / "trial-00000"


def test_a_killed_worker_goes_on_with_its_training(tmp_path):
    """In the old folder, with the old values; a worker of another name leaves it alone."""
    killed = search.open_study(tmp_path, 3).ask()
    killed.set_user_attr("worker", 3)
    drawn = search.suggest(killed, SPACE)
    assert search.take_over(search.open_study(tmp_path, 4), 4, tmp_path) == 0
    assert [trial.state.name for trial in search.open_study(tmp_path).trials] == ["RUNNING"]
    study, seen = search.open_study(tmp_path, 3), []
    assert search.take_over(study, 3, tmp_path) == 0

    def train(cfg, folder, **_):
        seen.append((cfg, folder))
        return Result(None, 100, None, {"quality": 1.0, "nfe_mean": 10.0})

    study.optimize(lambda trial: search.run_trial(trial, configure, SPACE, tmp_path, 0.0, train, worker=3), n_trials=1)
    ((cfg, folder),) = seen
    assert folder == tmp_path / "trial-00000" and f"policy.hidden={cfg.policy.hidden}" in drawn
    assert f"algorithm.learning_rate={cfg.algorithm.learning_rate}" in drawn
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    assert search.take_over(study, 3, tmp_path) == 1  # so one of its trainings is done


def begin_and(study, folder, error):
    """A training that leaves a checkpoint and then ends with ``error``."""
    places = []

    def train(cfg, place, **_):
        place.mkdir(exist_ok=True)
        (place / FILE).touch()
        places.append(place.name)
        raise error

    with pytest.raises(type(error)):
        study.optimize(lambda trial: search.run_trial(trial, configure, SPACE, folder, 0, train, worker=3), n_trials=1)
    return places


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA is gone")], ids=repr)
def test_an_interrupted_training_goes_on(tmp_path, error):
    """Optuna takes Ctrl-C for a failure; what had begun is not lost, and is taken over once."""
    study = search.open_study(tmp_path, 3)
    assert begin_and(study, tmp_path, error) == ["trial-00000"]
    assert [trial.state.name for trial in study.trials] == ["FAIL"]
    for _ in range(2):
        assert search.take_over(study, 3, tmp_path) == 0
    assert [trial.state.name for trial in study.trials] == ["FAIL", "WAITING"]
    study.optimize(
        lambda trial: search.run_trial(trial, configure, SPACE, tmp_path, 0, lambda *_, **__: DONE, worker=3),
        n_trials=1,
    )
    first, second = study.trials
    assert second.params == first.params and search.folder_name(second) == "trial-00000"
    assert search.take_over(study, 3, tmp_path) == 1 and len(study.trials) == 2


@pytest.mark.parametrize(("error", "times"), [(KeyboardInterrupt(), 5), (RuntimeError("NaN"), 3)], ids=repr)
def test_an_error_that_comes_again_is_left_at_last(tmp_path, error, times):
    """Interruptions may be any number: they say nothing about the training."""
    study, places = search.open_study(tmp_path, 3), []
    for _ in range(5):
        search.take_over(study, 3, tmp_path)
        places += begin_and(study, tmp_path, error)
    assert places.count("trial-00000") == times


def test_a_training_that_never_began_is_not_repeated(tmp_path):
    """A wrong setting is as wrong the second time."""
    study = search.open_study(tmp_path, 3)
    with pytest.raises(ZeroDivisionError):
        study.optimize(
            lambda trial: search.run_trial(trial, configure, SPACE, tmp_path, 0, lambda *_, **__: 1 / 0, worker=3),
            n_trials=1,
        )
    assert search.take_over(study, 3, tmp_path) == 0 and len(study.trials) == 1


def test_a_restarted_worker_draws_anew(tmp_path):
    """Its second training is no repetition of its first, killed or completed; a neighbour's neither."""

    def work(worker, trials):
        study = search.open_study(tmp_path, worker)
        search.take_over(study, worker, tmp_path)
        study.optimize(
            lambda trial: search.run_trial(trial, configure, SPACE, tmp_path, 0.0, trainer, worker=worker),
            n_trials=trials,
        )
        return [trial.params["algorithm.learning_rate"] for trial in study.trials]

    study = search.open_study(tmp_path, 3)
    search.take_over(study, 3, tmp_path)
    killed = study.ask()
    killed.set_user_attr("worker", 3)
    search.suggest(killed, SPACE)
    first, again, second = work(3, 2)
    assert again == first != second
    drawn = [*work(3, 1)[3:], *work(4, 2)[4:]]
    assert len({first, second, *drawn}) == 5


def test_the_best_trial_is_named_by_the_folder_that_it_has(tmp_path, monkeypatch, capsys):
    """A trial that was taken over trained on in the old one."""
    monkeypatch.setattr(search, "run_trial", partial(search.run_trial, trainer=trainer))
    (tmp_path / "space.yaml").write_text("policy.hidden: [128]\n")
    killed = search.open_study(tmp_path / "study").ask()
    killed.set_user_attr("worker", 3)
    options = ["--trials", "1", "--seed", "3", "--space", str(tmp_path / "space.yaml"), "--configs", str(CONFIGS)]
    search.main([str(tmp_path / "study"), *options])
    assert f"best of 2 trials: 0.9800 ({tmp_path / 'study' / 'trial-00000'})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("space", "overrides", "message"),
    [
        ("policy.hidden: [64]", ["reward=running"], "reward.normalisation=running: .*scales of its own"),
        ("reward.normalisation: [fixed]", [], "reward.normalisation cannot be searched"),
        ("reward: [fixed, running]", [], "reward cannot be searched"),
        ("reward.weights: [{clip_weight: 1}]", [], "reward.weights cannot be searched"),
        (
            "+reward.weights.clip_weight: {low: 0, high: 1}",
            [],
            r"\+reward.weights.clip_weight cannot .*only .*efficiency",
        ),
    ],
)
def test_trials_that_do_not_compare_are_refused(tmp_path, space, overrides, message):
    """Before anything is started: each would be judged by a reward of its own."""
    (tmp_path / "space.yaml").write_text(space + "\n")
    options = ["--space", str(tmp_path / "space.yaml"), "--configs", str(CONFIGS)]
    with pytest.raises(ValueError, match=message):
        search.main([str(tmp_path / "study"), *options, *overrides])
    assert not (tmp_path / "study").exists()


def test_the_price_may_be_searched(tmp_path, monkeypatch):
    """Trials train at prices of their own and are judged at the search's: all of them by the same one."""
    trained = []

    def train(cfg, folder, **_):
        trained.append(cfg.reward.weights.efficiency)
        return Result(None, 100, None, {"quality": 0.9, "nfe_mean": 10.0})

    monkeypatch.setattr(search, "run_trial", partial(search.run_trial, trainer=train))
    (tmp_path / "space.yaml").write_text("+reward.weights.efficiency: {low: 0.001, high: 0.01}\n")
    options = ["--trials", "3", "--seed", "0", "--space", str(tmp_path / "space.yaml"), "--configs", str(CONFIGS)]
    search.main([str(tmp_path / "study"), *options, "--price", "0.003"])
    trials = search.open_study(tmp_path / "study").trials
    assert trained == pytest.approx([trial.params["+reward.weights.efficiency"] for trial in trials])
    assert len(set(trained)) == 3 and all(0.001 <= price <= 0.01 for price in trained)
    assert [trial.value for trial in trials] == pytest.approx([0.9 - 0.003 * 10] * 3)


def test_workers_with_other_settings_are_refused(tmp_path):
    search.open_study(tmp_path, 0, {"price": 0.002, "overrides": ["env=tiny"]})
    search.open_study(tmp_path, 1, {"price": 0.002, "overrides": ["env=tiny"]})
    with pytest.raises(ValueError, match="price: 0.002 there, 0.1 now"):
        search.open_study(tmp_path, 2, {"price": 0.1, "overrides": ["env=tiny"]})


def test_a_trial_that_falls_behind_is_given_up(tmp_path):
    """The median of the others at the same look decides, as Optuna's pruner has it."""
    study = search.open_study(tmp_path, 0)
    for _ in range(6):
        trial = study.ask()
        for look in (1, 2, 3):
            trial.report(1.0, look)
        study.tell(trial, 1.0)
    trial, held_out = study.ask(), HeldOut.__new__(HeldOut)
    held_out.summary, held_out.every, held_out._rollouts = {"quality": 0.2, "nfe_mean": 0.0}, 1, 2
    report = search.Report(trial, 0.0)
    report.locals = {"callback": CallbackList([held_out])}
    with pytest.raises(optuna.TrialPruned, match="behind"):
        report._on_rollout_end()


@pytest.mark.parametrize("entry", [[], {"low": 1}, "many", {"low": 1, "high": 2, "step": 1}])
def test_bad_spaces_are_named(tmp_path, entry):
    trial = search.open_study(tmp_path).ask()
    with pytest.raises(ValueError, match="policy.hidden"):
        search.suggest(trial, {"policy.hidden": entry})


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        10,
        -1,
        2.5,
        1e-05,
        float("inf"),
        "null",
        "True",
        "nan",
        "10",
        "1e3",
        "",
        "a word",
        "it's, a=b",
        "C:\\",
    ]
    + [
        "runs/b.jsonl",
        "addiff_env:tiny/splits/dev.jsonl",
        "relative:0.5",
        "fixed",
        [1.5, None, "a,b"],
        {"a": [None, "1"]},
    ],
    ids=repr,
)
def test_choices_arrive_as_they_are(tmp_path, value):
    trial = search.open_study(tmp_path).ask()
    trial.suggest_categorical = lambda name, choices: choices[0]  # a journal keeps no mappings
    got = OmegaConf.to_container(configure(search.suggest(trial, {"+reward.chosen": [value]})))["reward"]["chosen"]
    assert got == value and type(got) is type(value)


def test_choices_may_be_null_or_a_group(tmp_path):
    study = search.open_study(tmp_path, 0)
    space = {"reward.target_nfe": [None, 10], "algorithm": ["ppo", "maskable_ppo"]}
    drawn = [configure(search.suggest(study.ask(), space)) for _ in range(12)]
    assert {cfg.reward.target_nfe for cfg in drawn} == {None, 10}
    assert {cfg.algorithm.name for cfg in drawn} == {"ppo", "maskable_ppo"}


def test_nothing_held_out_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="held_out.source"):
        search.objective_value({}, 0.002)
    trial = search.open_study(tmp_path).ask()
    with pytest.raises(ValueError, match="held_out.source"):  # before anything is trained
        search.run_trial(
            trial, lambda o: configure([*o, "prompts.held_out.source=null"]), SPACE, tmp_path, 0, lambda *_, **__: 1 / 0
        )
    (tmp_path / "space.yaml").write_text("[1, 2]")
    with pytest.raises(ValueError, match="space.yaml"):
        search.read_space(tmp_path / "space.yaml")
    assert set(search.read_space(CONFIGS / "search" / "ppo.yaml")) >= {"algorithm.learning_rate", "policy.hidden"}


def test_a_worker_trains_and_reports(small_kwargs, tmp_path, capsys):
    (tmp_path / "space.yaml").write_text("algorithm.ent_coef: [0.01]\n")
    little = ["num_envs=2", "algorithm.n_steps=4", "algorithm.batch_size=8", "algorithm.total_timesteps=16"]
    little += ["calibration_steps=2", "logging.formats=[csv]", "logging.held_out_every=1", "prompts.held_out.number=2"]
    settings = [f"+env.kwargs.{name}={value}" for name, value in small_kwargs.items()]
    options = ["--trials", "1", "--space", str(tmp_path / "space.yaml"), "--configs", str(CONFIGS)]
    search.main([str(tmp_path / "study"), *options, *little, *settings])
    assert "best of 1 trials" in capsys.readouterr().out
    (trial,) = search.open_study(tmp_path / "study").trials
    assert len(trial.intermediate_values) == 2 and trial.value == pytest.approx(trial.intermediate_values[2])
    assert (tmp_path / "study" / "trial-00000" / "agent" / "agent.json").exists()


@pytest.mark.parametrize("swept", [["seed=0"], ["env=tiny", "+reward.weights.efficiency=0.004", "seed=1"]])
def test_the_agents_of_a_sweep_can_be_named_to_an_evaluation(swept):
    """Hydra's own grammar reads the folders that a sweep (``train_sb3.py -m``) makes."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", swept, return_hydra_config=True)
        agent = f"runs/sweep/tiny/{cfg.hydra.sweep.subdir}/agent"
        several = compose("evaluate", [f"agents=[{agent},runs/b/agent]"])
        single = compose("evaluate", [f"agent={agent}"])
    assert list(several.agents) == [agent, "runs/b/agent"] and single.agent == agent


def test_a_worker_runs_no_fewer_than_no_trainings(capsys):
    with pytest.raises(SystemExit):
        search.main(["study", "--trials", "-1"])
    assert "-1" in capsys.readouterr().err
