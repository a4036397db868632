"""Commands that are printed for copying, and what Ctrl-C leaves on the screen."""

import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from addiff_env.storage.commands import command_line, interruptible, override, spelled, this_command, this_program

PARSER = OverridesParser.create()
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=30)


@given(st.lists(TEXT, min_size=1))
@example(["tensorboard", "--logdir", "runs/a b/it's [x]"])
def test_a_shell_reads_the_words_back(words):
    assert shlex.split(command_line(*words)) == words


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(VALUES)
@example("runs/a b")
@example(r"C:\runs\'x'")
@example("1e-3")
@example("null")
@example("é")
def test_hydra_reads_the_value_back_through_the_shell(value):
    (word,) = shlex.split(command_line(override("hydra.run.dir", value)))
    read = PARSER.parse_override(word)
    assert read.key_or_group == "hydra.run.dir"
    assert read.value() == value and spelled(read.value()) == spelled(value)


def test_paths_are_words(tmp_path):
    assert shlex.split(command_line("tensorboard", "--logdir", tmp_path / "a b"))[-1] == str(tmp_path / "a b")
    assert override("agent", Path("runs/a b")) == "agent='runs/a b'"


def test_an_interruption_says_what_is_kept_and_how_to_go_on(monkeypatch, capsys):
    words = ["/usr/bin/python3", "train_sb3.py", "hydra.run.dir='runs/a b'", "prompts.source=[it's, (new)]"]
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended, interruptible(lambda: "12 rows are kept", ["resume=true"]):
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert ended.value.code == 130 and "12 rows are kept" in said and "Traceback" not in said
    command = said.partition("go on with: ")[2].strip()
    assert shlex.split(command) == ["python3", *words[1:], "resume=true"]
    assert shlex.split(this_command()) == ["python3", *words[1:]]
    with pytest.raises(ValueError, match="another"), interruptible(lambda: "nothing"):
        raise ValueError("another")


@pytest.mark.parametrize(
    ("started", "arguments", "said"),
    [
        (["/usr/bin/python3", "evaluate.py", "seed=1"], ["seed=1"], ["python3", "evaluate.py"]),
        (["/usr/bin/python3", "-m", "addiff_env.cli", "evaluate"], [], ["python3", "-m", "addiff_env.cli", "evaluate"]),
        (["/usr/bin/python3", "/opt/bin/addiff", "evaluate", "a=1"], ["a=1"], ["addiff", "evaluate"]),
        (["/usr/bin/python3", "/other/bin/addiff", "evaluate", "a=1"], ["a=1"], ["/other/bin/addiff", "evaluate"]),
    ],
)
def test_a_program_is_named_as_one_starts_it_again(monkeypatch, tmp_path, started, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    monkeypatch.setattr("addiff_env.storage.commands.shutil.which", lambda name: f"/opt/bin/{name}")
    assert this_program() == said
    assert shlex.split(this_command("x=2")) == [*said, *arguments, "x=2"]


def test_a_program_called_from_python_has_no_words_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "notebook"])
    monkeypatch.setattr(sys, "argv", ["notebook", "benchmark.limit=8", "hydra.run.dir=runs/a b"])
    assert this_program() == []
    monkeypatch.setattr(sys, "orig_argv", ["python", "evaluate.py", "benchmark.limit=8", "hydra.run.dir=runs/a b"])
    assert this_program()[-1] == "evaluate.py"
