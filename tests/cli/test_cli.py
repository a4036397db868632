"""The command ``addiff``: its verbs, what it says of mistakes, and a wheel that has everything."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import types
import venv
import zipfile
from importlib import import_module
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from hydra.core.hydra_config import HydraConfig

import addiff_env
from addiff_env import cli
from addiff_env.loading.paths import configs_folder
from addiff_env.tiny.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
HYDRA = ("train", "train-rllib", "evaluate")  # have its syntax and help


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_a_program_that_names_itself(verb, capsys):
    """Each has a help text of its own, status 0, under the name that it is called by."""
    with pytest.raises(SystemExit) as left:
        cli.main([*verb.split(), "--help"])
    assert not left.value.code
    assert (f"usage: addiff {verb} " if verb not in HYDRA else "Override anything") in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("verb", ["doctor", "selftest", "bench", "train", "baselines", "convert", "profile", "record"])
@pytest.mark.parametrize(
    ("env_id", "said"), [("CartPole-v1", "another kind"), ("AdDiffusion-Tiny-v9", "no registered")]
)
def test_an_environment_of_another_kind_is_called_so(
    verb: str, env_id: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "agent.zip").touch()
    words = {
        "doctor": [f"env={env_id}"],
        "selftest": [f"env={env_id}"],
        "bench": [f"id={env_id}"],
        "train": [f"env.id={env_id}", f"hydra.run.dir={tmp_path / 'run'}"],
        "baselines": [str(tmp_path / "kept.jsonl"), "--env", env_id],
        "convert": ["import", str(tmp_path / "agent.zip"), str(tmp_path / "agent"), "--env", env_id],
        "profile": ["--id", env_id],
        "record": ["some/data-v0", "--env", env_id],
    }
    assert cli.main([verb, *words[verb]]) == 1
    told = capsys.readouterr().err
    assert said in told and repr(env_id) in told and "AdDiffusion-Tiny-v0" in told


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb not in (*HYDRA, "world train")])
def test_an_unknown_option_is_bad_usage(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([*verb.split(), "--no-such-option"])
    assert left.value.code == 2 and f"addiff {verb}" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES[1:])  # the first is a verb as well
def test_every_recipe_has_its_own_options(recipe, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["world", "train", recipe, "--help"])
    assert not left.value.code and f"usage: addiff world train {recipe} " in capsys.readouterr().out


def test_the_help_names_every_verb_and_loads_nothing_heavy():
    heavy = ("torch", "diffusers", "transformers", "stable_baselines3", "hydra", "matplotlib")
    code = f"import sys; from addiff_env.cli import main; main(['--help']); print({heavy} & sys.modules.keys())"
    code = code.replace(f"{heavy} &", f"set({heavy}) &")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, loaded = result.stdout.splitlines()
    assert loaded == "set()"
    for verb, (_, summary) in cli.VERBS.items():
        assert sum(line.split() == [*verb.split(), *summary.split()] for line in lines) == 1


def test_the_page_of_the_command_shows_its_help():
    assert cli.usage(cli.VERBS) in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def test_the_release_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"addiff {addiff_env.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evalute", "x=1"], "no verb 'evalute'; did you mean evaluate?"),
        (["wrold", "train"], "did you mean world?"),
        (["world", "qualty"], "no verb 'world qualty'; did you mean world quality"),
        (["--colour"], "no verb '--colour'; see: addiff --help"),
        (["world", "zzz"], "no verb 'world zzz'; see: addiff --help"),
    ],
)
def test_an_unknown_verb_is_bad_usage_and_close_ones_are_named(capsys, words, said):
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""


@pytest.mark.parametrize(("words", "status"), [([], 2), (["world"], 2), (["world", "--help"], 0), (["-h"], 0)])
def test_the_verbs_are_listed(capsys, words, status):
    assert cli.main(words) == status
    text = capsys.readouterr().out
    assert "world quality" in text and ("baselines" in text) == (words[:1] != ["world"])


def raising(error):
    def main(argv):
        raise error

    return types.SimpleNamespace(main=main)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("solver: got 'heun'"), 1, "solver: got 'heun'"),
        (FileNotFoundError("no rows.jsonl in 'x'"), 1, "no rows.jsonl in 'x'"),
        (PermissionError(13, "Permission denied", "/x"), 1, "[Errno 13] Permission denied: '/x'"),
        (ModuleNotFoundError("No module named 'optuna'", name="optuna"), 1, "pip install 'addiff-env[search]'"),
        (gym.error.NameNotFound("Environment `Nano` doesn't exist."), 1, "`Nano`"),
        (TypeError("unexpected keyword argument 'colour'"), 1, "'colour'"),
        (ValueError(), 1, "ValueError"),
        (MemoryError(), 1, "out of memory: "),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory: CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "num_envs"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_expected_errors_are_one_line(monkeypatch, capsys, error, status, said):
    monkeypatch.setattr(cli, "import_module", lambda name: raising(error))
    assert cli.main(["report", "runs"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (status == 1) and all(line.startswith("addiff report: ") and said in line for line in lines)
    assert cli.main(["acceptance", "agent"]) == (2 if status == 1 else status)  # where 1 says that a bar is missed
    monkeypatch.setenv("ADDIFF_TRACEBACK", "1")
    if status == 1:
        with pytest.raises(type(error)):
            cli.main(["report", "runs"])


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), RuntimeError("shapes do not match")])
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(cli, "import_module", lambda name: raising(error))
    with pytest.raises(type(error)):
        cli.main(["report", "runs"])


def test_all_recipes_run_in_order_until_one_fails(monkeypatch):
    world, calls = import_module("addiff_env.tiny.recipes.command"), []

    def run(command):
        calls.append(command[command.index("train") + 1 :])
        return subprocess.CompletedProcess(command, 3 if "clip" in command else 0)

    monkeypatch.setattr(world.subprocess, "run", run)
    assert cli.main(["world", "train", "--seed", "1"]) == 3
    assert calls == [[recipe, "--seed", "1"] for recipe in RECIPES[: RECIPES.index("clip") + 1]]


@pytest.mark.parametrize("words", [["nose"], ["--steps", "3"], ["--seed", "x"], ["--seed", "1", "clip"]])
def test_what_not_every_recipe_takes_is_refused_before_the_first_runs(monkeypatch, capsys, words):
    monkeypatch.setattr(
        import_module("addiff_env.tiny.recipes.command").subprocess, "run", lambda *_: pytest.fail("ran")
    )
    with pytest.raises(SystemExit) as left:
        cli.main(["world", "train", *words])
    assert left.value.code == 2 and words[-1] in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("env.kwargs.colour=red", "Could not override 'env.kwargs"),
        ("+prompts=nowhere", "nowhere"),
        ("a=b=[", "a=b=["),
        ("num_envs=${nothing}", "nothing"),
        ("agent=/nowhere/agent", "agent"),
    ],
)
def test_mistakes_of_a_configuration_are_told_without_a_traceback(tmp_path, monkeypatch, capsys, verb, override, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the command sets it, for this test alone
    assert cli.main([verb, override, "hydra.run.dir=run"]) == 1
    told = capsys.readouterr().err
    assert said in told and f"addiff {verb}: " in told and "Traceback" not in told


def test_hydra_keeps_its_syntax(tmp_path, monkeypatch, capsys):
    shutil.copytree(configs_folder() / "env", tmp_path / "mine" / "env")
    shutil.copy(tmp_path / "mine" / "env" / "tiny.yaml", tmp_path / "mine" / "env" / "own.yaml")
    monkeypatch.chdir(tmp_path)
    before = HydraConfig.instance().cfg
    assert cli.main(["train", "--config-dir", "mine", "env=own", "seed=7", "--cfg", "job"]) == 0
    assert HydraConfig.instance().cfg is before  # a training that is called from Python next is not this one's
    printed = capsys.readouterr().out
    assert "seed: 7\n" in printed and "id: AdDiffusion-Tiny-v0" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


# --------------------------------------------------------------------------- the wheel


def contents(folder):
    """Every file below ``folder`` and what it holds; but for the interpreter's own byte code."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files that git knows, or would take; nothing that an earlier build left goes in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {f"addiff_env/{name}" for name in contents(ROOT / "addiff_env")}
    assert names == package | {f"addiff_env/configs/{name}" for name in contents(ROOT / "configs")}
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_an_installed_wheel_trains_evaluates_and_reports(wheel, tmp_path):
    """From another folder, without the repository, in a package folder that nobody may write to."""
    unset = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "ADDIFF_DATA")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    lookup = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", lookup], capture_output=True, text=True, check=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, env=environment)
    (site / "zz_libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # what the package depends on
    installed, elsewhere = site / "addiff_env", tmp_path / "else where"
    elsewhere.mkdir()
    before = contents(installed)
    subprocess.run(["chmod", "-R", "a-w", str(installed)], check=True)

    def run(*words):
        result = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr
        return result.stdout

    addiff = str(python.with_name("addiff"))
    assert run(str(python), "-c", "import addiff_env; print(addiff_env.__file__)").strip() == str(
        installed / "__init__.py"
    )
    sizes = ["num_envs=8", "algorithm.total_timesteps=256", "algorithm.n_steps=16", "progress_bar=false"]
    run(addiff, "train", *sizes, "hydra.run.dir=runs/mine")
    trained = ["agent=runs/mine/agent", "methods=[ddim-10,agent]", "controls=false", "filmstrips=1"]
    run(addiff, "evaluate", "benchmark.limit=8", *trained, "hydra.run.dir=runs/evaluated")
    page = elsewhere / "runs" / "evaluated" / "report.html"
    whole = page.read_bytes()
    page.unlink()
    assert str(page.relative_to(elsewhere)) in run(addiff, "report", "runs/evaluated")
    assert page.read_bytes() == whole
    subprocess.run(["chmod", "-R", "u+w", str(installed)], check=True)
    assert contents(installed) == before
