"""The documentation runs: its Python as it stands, its commands as far as they cost nothing; what it names exists."""

import argparse
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from addiff_env import cli
from addiff_env.env.config import EnvConfig

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "addiff_env" / "tiny" / "weights" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"ray"}  # starts worker processes
HYDRA = {"train": "train", "train-rllib": "train_rllib", "evaluate": "evaluate"}  # verb: its configuration
JOBS = {"train": "train", "sweep": "train", "evaluate": "evaluate", "ray": "train_rllib"}  # likewise, of submit.sh
SCRIPTS = {"train_sb3.py": "train", "evaluate.py": "evaluate"}
OTHERS = {".", "export", "git", "cd", "tensorboard", "hf"}  # programs that are not ours
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def inline(page: Path) -> list[str]:
    """What a page sets in code within its prose and tables."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))


# --------------------------------------------------------------------------- Python


def python_blocks() -> list[pytest.param]:  # type: ignore[valid-type]
    """Every Python block of the pages, named by page and heading."""
    found = []
    for page in PAGES:
        for section in re.split(r"^#+ ", text_of(page), flags=re.MULTILINE)[1:]:
            title = section.splitlines()[0]
            for number, (language, source) in enumerate(FENCE.findall(section)):
                if language == "python":
                    libraries = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
                    marks = [pytest.mark.slow] if libraries & SLOW else []
                    found.append(pytest.param(source, libraries, id=f"{page.stem}: {title} {number}", marks=marks))
    return found


@pytest.mark.parametrize(("source", "libraries"), python_blocks())
def test_examples_run(source: str, libraries: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in sorted(libraries):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "example", "exec"), {"__name__": "example"})


# --------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[str]:
    """Every command of a page: lines of its shell blocks, and code within prose that begins with one of ours."""
    for language, source in FENCE.findall(text_of(page)):
        if language in ("sh", "bash"):
            yield from filter(None, source.replace("\\\n", " ").splitlines())
    ours = re.compile(r"(addiff|make|python|pip|torchrun|accelerate|slurm/submit\.sh) \S")
    yield from (code for code in inline(page) if ours.match(code) and "<verb>" not in code and "..." not in code)


def shell_commands() -> list[pytest.param]:  # type: ignore[valid-type]
    found = dict.fromkeys((line, name_of(page)) for page in PAGES for line in commands(page))
    return [pytest.param(line, id=f"{page}: {line}") for line, page in found if shlex.split(line, comments=True)]


@pytest.mark.parametrize("line", shell_commands())
def test_commands_are_understood(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs and options exist, configurations compose, targets can be made, job scripts accept; nothing long runs."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line, comments=True)
    while "=" in words[0]:  # variables of this command alone
        words = words[1:]
    program, *rest = words
    if script := next((word for word in words if word in SCRIPTS), None):  # python, torchrun, accelerate launch
        understand_verb([SCRIPTS[script], *words[words.index(script) + 1 :]], monkeypatch)
    elif program == "addiff":
        understand_verb(rest, monkeypatch)
    elif program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "slurm/submit.sh":
        submit(rest, tmp_path, monkeypatch)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests"))
    elif "addiff_env.cli" in words:  # python -m, torchrun -m
        understand_verb(words[words.index("addiff_env.cli") + 1 :] or ["--help"], monkeypatch)
    elif program == "pip":
        understand_pip(rest)
    else:
        assert program in OTHERS, f"nobody checks {line!r}"


class Understood(Exception):
    """The options could be read; what would follow takes long."""


def only(read: Callable[..., argparse.Namespace]) -> Callable[..., None]:
    """A parser's method that ends the program once it has read the options."""

    def read_only(*args: Any, **kwargs: Any) -> None:
        read(*args, **kwargs)
        raise Understood

    return read_only


def understand_verb(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose the configuration of a verb that Hydra configures, or read the options of another one."""
    if " ".join(words) in cli.VERBS:  # what a page says of the verb in general
        return
    if words[0] in HYDRA:
        return understand_hydra(HYDRA[words[0]], words[1:])
    if words[0] in ("--help", "--version"):
        assert cli.main(words) == 0
        return
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, only(getattr(argparse.ArgumentParser, name)))
    with pytest.raises(Understood):
        cli.main(words)


def understand_hydra(name: str, words: list[str]) -> None:
    """Every override is read and composes; of a sweep, with the first of its values."""
    words = [word for word in words if word not in ("-m", "--cfg", "job")]
    if "--config-dir" in words:  # a folder of the reader's own
        return
    overrides, named = [], [re.sub(r"<(\w+)>", r"\1", word) for word in words]  # <folder>: what a reader fills in
    for override in OverridesParser.create().parse_overrides(named):
        swept = override.is_sweep_override()
        value = next(override.sweep_string_iterator()) if swept else override.get_value_element_as_str()
        overrides.append(f"{override.input_line.partition('=')[0]}={value}")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(name, overrides=overrides)


def submit(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the real script with a stand-in for sbatch that says what it was given."""
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/sh\necho "$@" >&2\n')
    fake.chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ADDIFF_RUNS": str(tmp_path), "ADDIFF_PARTITION": "any"}
    command = [ROOT / "slurm" / "submit.sh", *words]
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0 and f"slurm/{words[0]}.sbatch" in done.stderr, done.stderr
    if words[0] in JOBS:
        understand_hydra(JOBS[words[0]], [word for word in words[1:] if not word.isdecimal()])


def understand_pip(words: list[str]) -> None:
    assert words[0] == "install"
    _, _, extras = text_of(ROOT / "pyproject.toml").partition("[project.optional-dependencies]\n")
    known = set(re.findall(r"^(\w+) = \[", extras.partition("\n[")[0], re.MULTILINE))
    for named in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= known


# --------------------------------------------------------------------------- names


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def alternatives(code: str) -> list[str]:
    """``a/{b,c}`` as ``a/b`` and ``a/c``."""
    if not (found := re.search(r"\{([^{}]*)\}", code)):
        return [code]
    return [
        one for part in found[1].split(",") for one in alternatives(code[: found.start()] + part + code[found.end() :])
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_names_exist(page: Path) -> None:
    """What prose calls a file of the repository, or a name inside the package, is one."""
    for code in inline(page):
        if re.fullmatch(r"(addiff_env|configs|docs|slurm|tests)/[\w./{},*-]*", code):
            assert all(any(ROOT.glob(path.rstrip("/"))) for path in alternatives(code)), code
        elif re.fullmatch(r"addiff_env(\.\w+)+", code):
            pkgutil.resolve_name(code)
    for module, name in re.findall(r"`(addiff_env/[\w/]+)\.py`: `([\w.]+)`", text_of(page)):
        pkgutil.resolve_name(f"{module.replace('/', '.')}:{name}")


def test_the_page_of_the_environment_names_every_setting() -> None:
    assert {field.name for field in fields(EnvConfig)} <= set(inline(ROOT / "docs" / "environment.md"))


def test_every_environment_variable_is_documented_and_real() -> None:
    """Those of the package and the job scripts, in the documentation, and the other way round."""
    name = re.compile(r"ADDIFF_[A-Z_]*[A-Z]")
    sources = [*(ROOT / "addiff_env").rglob("*.py"), *(ROOT / "slurm").iterdir()]
    read = set(name.findall("\n".join(text_of(path) for path in sources if path.is_file())))
    told = set(name.findall("\n".join(map(text_of, PAGES))))
    examples = {each for each in read | told if each.startswith("ADDIFF_JUDGE")}  # of one judge; the name is free
    assert told - read - examples == set()
    assert read - told - examples == set()
