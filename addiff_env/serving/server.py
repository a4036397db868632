"""Starting the page, and ending it so that nothing is left: no thread, no file, no port."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from addiff_env.serving.studio import Studio

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when Gradio is imported
_MAX_UPLOAD = 1  # byte: the page takes no files


def require_gradio() -> None:
    """Import Gradio, which makes itself a folder of `temporary_files`.

    Raises:
        ImportError: it is not there, or not usable; with the command that brings it.
    """
    os.environ.update(_SETTINGS)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the page needs Gradio ({error}): pip install 'addiff-env[web]'") from error


def check_address(host: str, port: int) -> None:
    """Check that the page can be at ``host`` and ``port``.

    Raises:
        OSError: it cannot, e.g. because the port is in use; the message names both.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(found[0][4])
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} is in use; name another one: --port {port + 1}"
        raise OSError(f"cannot serve at {host}:{port}: {reason}") from error


@contextmanager
def temporary_files() -> Iterator[str]:
    """A folder for all that Gradio writes, removed at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="addiff-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield folder
        finally:
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextmanager
def served(page: Any, studio: Studio, host: str, port: int, folder: str) -> Iterator[str]:
    """The page at its address, which is given, for as long as the block lasts.

    Files are served from ``folder`` alone, and nothing is sent to or fetched from anywhere else.
    """
    from addiff_env.serving.page import CSS, theme

    page.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css_paths=CSS,
        allowed_paths=[folder],
        max_file_size=_MAX_UPLOAD,
        prevent_thread_lock=True,
        quiet=True,
        **_CLOSED,
    )
    try:
        yield page.local_url
    finally:
        studio.close()
        page.close(verbose=False)


# What Gradio would offer besides: none of it is wanted on a page of one's own machine.
_CLOSED: dict[str, Any] = {
    "share": False,
    "inbrowser": False,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "num_workers": 0,
}


@contextmanager
def interrupted_by_term() -> Iterator[None]:
    """Let the process be told to end (SIGTERM) as by Ctrl-C, so that it tidies up."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_until_interrupted() -> None:
    """Return at Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        return
