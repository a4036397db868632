"""The architecture of docs/concepts.md: the contracts of pyproject.toml, no circles, and packages that load lightly."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import grimp
import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIGHT = ["addiff_env", "addiff_env.cli", "addiff_env.tiny.scenes", "addiff_env.loading.paths"]
FOLDERS = ["sb3", "rllib", "evaluation", "diffusion", "perception", "storage", "loading", "tiny"]
HEAVY = ["torch", "diffusers", "transformers", "stable_baselines3", "sb3_contrib"]


def test_imports_keep_the_contracts() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = grimp.build_graph("addiff_env")
    arrows = [(module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module)]
    circles = [
        sorted(part) for part in networkx.strongly_connected_components(networkx.DiGraph(arrows)) if len(part) > 1
    ]
    assert circles == []


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", FOLDERS)
def test_a_folder_loads_nothing_by_itself(package: str) -> None:
    code = f"import sys, addiff_env.{package}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "package", ["agent", "diffusion.backbones", "env", "perception.scorers", "pipeline", "sb3", "scorers"]
)
def test_every_name_that_a_package_offers_is_there(package: str) -> None:
    module = import_module(f"addiff_env.{package}")
    assert module.__all__ and all(hasattr(module, name) for name in module.__all__)
