"""The page as a server: what it answers, what it refuses, and that nothing is left of it."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from serving_agents import collect_event_loops, free_port

from addiff_env.cli.web import fixed_picture
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.serving.page import build, make_picture
from addiff_env.serving.server import check_address, served, temporary_files
from addiff_env.serving.studio import Studio

# Of Gradio and what it imports; not of what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
GOOD = ["a red circle", 3, 5.0, True, 4]


@pytest.fixture(autouse=True)
def event_loops() -> Iterator[None]:
    yield
    collect_event_loops()


@pytest.fixture
def url(studio: Studio) -> Iterator[str]:
    with temporary_files() as folder:
        page = build(studio, studio.presets(["a star"]), queue_size=1, pace=0)
        with served(page, studio, "127.0.0.1", free_port(), folder) as address:
            yield address


def status(url: str, path: str, data: bytes | None = None) -> int:
    """Of an answer; a path is sent as it stands."""
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


# --------------------------------------------------------------------------- what a visitor sees


def test_a_picture_is_followed_step_by_step(studio: Studio) -> None:
    shown = list(make_picture(studio, 0, *GOOD))
    messages = [message for message, *_ in shown]
    assert "Starting" in messages[0] and "The agent decides" in messages[1] and "Done. Agent" in messages[-1]
    assert any("fixed number" in message for message in messages)
    steps = [row for _, _, row in shown]
    assert all(after.startswith(before) for before, after in zip(steps, steps[1:], strict=False))


@pytest.mark.parametrize(
    "wrong", [["", *GOOD[1:]], ["a" * 501, *GOOD[1:]], ["a star", -1, 5.0, True, 4], ["a star", 3, 99.0, True, 4]]
)
def test_a_request_beyond_the_limits_gets_a_message(studio: Studio, wrong: list[Any]) -> None:
    ((message, *rest),) = make_picture(studio, 0, *wrong)
    assert 'role="alert"' in message and all(not isinstance(part, str) for part in rest)  # what is shown stays


def test_a_failure_is_told_and_logged(
    studio: Studio, pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(pipe.env.backbone, "predict", fails)
    *_, (message, *_) = make_picture(studio, 0, *GOOD)
    assert 'role="alert"' in message and "out of &lt;memory&gt;" in message and "a picture failed" in caplog.text


def test_a_visitor_who_leaves_ends_the_lane(pipe: AdaptivePipeline) -> None:
    studio = Studio(AdaptivePipeline(make_agent_env(pipe.agent, 1, price_range=None), _Endless()), fixed_picture)
    shown = make_picture(studio, 0, "a star", 3, studio.limits.budget.high, False, 4)
    next(shown), next(shown)
    shown.close()  # type: ignore[attr-defined]
    assert studio.pipe("a star", seeds=1, max_nfe=5).nfe == [5]


class _Endless:
    """Goes on to the end."""

    flops = 0.0

    def act(self, obs: Any, action_mask: Any = None) -> Any:
        import numpy as np

        return np.zeros(len(obs), np.int64)


# --------------------------------------------------------------------------- the server


def test_no_file_outside_its_folder_is_served(url: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    here = Path(__file__).resolve()
    secrets = ["/etc/passwd", str(tmp_path / "secret.txt"), str(here), str(here.parents[2] / "pyproject.toml")]
    secrets += ["pyproject.toml", "../pyproject.toml", f"{os.environ['GRADIO_TEMP_DIR']}/../../etc/passwd"]
    assert status(url, "") == 200
    for secret in secrets:
        for way in ("gradio_api/file=", "file=", "gradio_api/file/", "file/", "static/", "assets/"):
            assert status(url, way + secret) in (401, 403, 404, 405), (way, secret)
    for folder in (f"gradio_api/file={Path(__file__).as_uri()}", "monitoring"):
        assert status(url, folder) >= 400, folder


def test_nothing_is_taken_and_nothing_is_offered_to_programs(url: str) -> None:
    boundary = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    request = urllib.request.Request(
        url + "gradio_api/upload", boundary, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=30)
    with urllib.request.urlopen(url + "gradio_api/info", timeout=30) as answer:
        assert json.load(answer)["named_endpoints"] == {}


def test_a_full_queue_turns_requests_away(url: str, pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), pipe.env.backbone.predict

    def slow(*args: object, **kwargs: object) -> object:
        go.wait(30)
        return real(*args, **kwargs)

    monkeypatch.setattr(pipe.env.backbone, "predict", slow)
    with urllib.request.urlopen(url + "config", timeout=30) as answer:
        dependencies = json.load(answer)["dependencies"]
    (run,) = [one["id"] for one in dependencies if ("start" not in str(one)) and len(one["inputs"]) == 5][:1]
    answers = []
    for visitor in range(4):  # one runs, one waits
        body = {"data": GOOD, "fn_index": run, "session_hash": f"visitor{visitor}"}
        answers.append(status(url, "gradio_api/queue/join", json.dumps(body).encode()))
        time.sleep(0.5)
    go.set()
    assert answers[:2] == [200, 200] and answers[-1] >= 400


def test_nothing_is_left_of_it(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with temporary_files() as folder:
        page, port = build(studio, studio.presets(["a star"])), free_port()
        with served(page, studio, "127.0.0.1", port, folder) as address:
            assert address == f"http://127.0.0.1:{port}/" and status(address, "") == 200
            assert list(Path(folder).rglob("*.png"))
            with pytest.raises(OSError, match=f"port {port} is in use.*--port {port + 1}"):
                check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    assert not Path(folder).exists() and "GRADIO_TEMP_DIR" not in os.environ and list(tmp_path.iterdir()) == []


def test_an_address_that_is_not_here_is_refused() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(OSError, match=f"cannot serve at {host}:7860"):
            check_address(host, 7860)
