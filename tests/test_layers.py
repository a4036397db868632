"""DESIGN's layers: imports point downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "addiff_env"
LAYERS = (  # low to high; a module imports from strictly lower layers, or from its own package
    "types",
    "paths",
    "isolation",
    "validation",
    "stats",
    "storage",
    "commands",
    "samplers",
    "attention",
    "loading",
    "inputs",
    "preprocessing",
    "encoders",
    "scorers",
    "reward",
    "backbones",
    "previews",
    "config",
    "dynamics",
    "refine",
    "prompts",
    "perception",
    "footprint",
    "costs",
    "env",
    "filmstrips",
    "baseline_cache",
    "agent",
    "offline",
    "rllib",
    "sb3",
    "pipeline",
    "tiny",
    "evaluation",
    "bar",
    "share",
    "cli",
)
SB3 = {"stable_baselines3", "sb3_contrib"}
LIGHT = {*sys.stdlib_module_names, "gymnasium", "numpy", "addiff_env"}  # what a package's __init__ may import


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False, anywhere: bool = True) -> set[str]:
    """Absolute names of what ``source`` imports; also inside functions when ``anywhere``."""
    tree = ast.parse(source)
    found: set[str] = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if is_package else module.split(".")[:-1]
            parents = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            # `from addiff_env import env` names a module, `from addiff_env import __version__` does not.
            is_module = origin == "addiff_env"
            found |= {f"{origin}.{alias.name}" for alias in node.names} if is_module else {origin}
    return found


def layer(module: str) -> int:
    name = module.split(".")[1]
    if name not in LAYERS:
        raise ValueError(f"{module} is in no layer; add {name!r} to LAYERS where DESIGN puts it")
    return LAYERS.index(name)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    found = []
    for target in sorted(imports(source, module, is_package)):
        top, *rest = target.split(".")
        if top in SB3 and module.split(".")[1:2] != ["sb3"]:
            found.append(f"{module} imports {target}: only addiff_env.sb3 may")
        if top != "addiff_env" or not rest or rest[0].startswith("__"):
            continue
        inside = module.split(".")[1:2] == rest[:1]
        if module != "addiff_env" and not inside and layer(target) >= layer(module):
            found.append(f"{module} imports {target}, which is not below it")
    if is_package:
        direct = imports(source, module, is_package, anywhere=False)
        heavy = sorted(name for name in direct if name.split(".")[0] not in LIGHT)
        found += [f"{module}/__init__.py imports {name}, which is heavy" for name in heavy]
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_imports_point_downwards(path: Path) -> None:
    if module_name(path) != "addiff_env":
        layer(module_name(path))  # every module belongs to a layer
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("addiff_env.env.reward", "from addiff_env.env import DiffusionDenoiseEnv", "not below"),
        ("addiff_env.env.reward", "from addiff_env import env", "not below"),
        ("addiff_env.env.reward", "from . import env", "not below"),
        ("addiff_env.env.reward", "from .env import Vector", "not below"),
        ("addiff_env.env.reward", "import addiff_env.tiny.checker as c", "not below"),
        ("addiff_env.diffusion.samplers", "def f():\n    from addiff_env import attention", "not below"),
        ("addiff_env.diffusion.backbones.flux", "from ..evaluation.judge import Judge", "not below"),
        ("addiff_env.agent", "import stable_baselines3.common.utils", "only addiff_env.sb3"),
        ("addiff_env.agent", "def f():\n    from sb3_contrib import MaskablePPO", "only addiff_env.sb3"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str, complaint: str) -> None:
    (found,) = violations(source, module)
    assert complaint in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("addiff_env.env", "from addiff_env import reward, types\nimport torch"),
        ("addiff_env.env", "from .backbones import stable_diffusion"),
        (
            "addiff_env.diffusion.backbones.flux",
            "from .base import Backbone\nfrom addiff_env.diffusion.backbones import base",
        ),
        ("addiff_env.sb3", "from stable_baselines3 import PPO\nfrom addiff_env import __version__"),
        ("addiff_env.diffusion.samplers", "X = 'addiff_env.env:DiffusionDenoiseEnv'"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_heavy_package_is_seen() -> None:
    assert violations("import torch", "addiff_env", is_package=True)
    assert violations("from transformers import CLIPModel", "addiff_env.tiny", is_package=True)
    assert violations("from gymnasium import register\nimport os", "addiff_env", is_package=True) == []


def test_an_unknown_module_is_refused() -> None:
    with pytest.raises(ValueError, match="'helpers'"):
        layer("addiff_env.helpers")
    with pytest.raises(ValueError, match="'helpers'"):
        violations("from addiff_env.helpers import f", "addiff_env.env")


@pytest.mark.parametrize("module", ["addiff_env", "addiff_env.tiny.scenes"])
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "diffusers", "transformers", *sorted(SB3)]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
