"""``addiff web``: what it refuses before it loads anything, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving_agents import free_port, small_agent

from addiff_env import cli


@pytest.fixture(scope="module")
def bundle(small_kwargs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agent")
    small_agent(small_kwargs).save(folder)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "x"],
        ["--queue-size", "0"],
        ["--presets", "-1"],
        ["--pace", "nan"],
        ["--steps", "0"],
        ["--prompt-length", "0"],
        ["a prompt"],
    ],
)
def test_wrong_options_are_bad_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["web", *words])
    assert ended.value.code == 2 and words[0] in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["web"]) == 1
    assert "pip install 'addiff-env[web]'" in capsys.readouterr().err


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["web", "--port", str(port)]) == 1
    said = capsys.readouterr()
    assert f"port {port} is in use" in said.err and "loading" not in said.out


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [("web", "--port", "0"), ("web", "--port", "http"), ("web", "--presets", "-1"), ("web", "--presets", "x")]
    + [("web", "--pace", "nan"), ("web", "--pace", "fast"), ("generate", "--seed", "1.5")]
    + [("record", "--episodes", "0"), ("record", "--num-envs", "x")]
    + [("world rules", "--number", "0"), ("world finishes", "--steps", "-1")],
)
def test_a_wrong_number_is_named_with_what_may_stand_there(
    verb: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*verb.split(), option, value])
    told = capsys.readouterr().err
    assert left.value.code == 2 and option in told and value in told and "must be" in told and "invalid _" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--agent", "no/such/folder"], "no/such/folder"),
        (["--env", "NoSuch-v0"], "no registered environment"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--steps", "1000"], "whole number from 1 to 50, got 1000"),
        (["--device", "nowhere"], "nowhere"),
    ],
)
def test_wrong_settings_are_one_line(
    words: list[str], said: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    assert cli.main(["web", "--port", "7999", "--agent", str(bundle), *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_it_ends_cleanly_when_it_is_interrupted(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, "-m", "addiff_env.cli", "web", "--agent", str(bundle), "--port", str(port)]
    command += ["--presets", "1"]
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    surroundings = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    # A suite that runs in the background may ignore the signal, which its children would inherit.
    before = signal.signal(number, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, env=surroundings, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(number, before)
    try:
        assert process.stdout is not None
        assert any("the page is at" in line for line in iter(process.stdout.readline, ""))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
