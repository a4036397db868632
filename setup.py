"""Packs the folder ``configs`` into the package as ``addiff_env/configs``; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["addiff_env*"]), "addiff_env.configs"],
    package_dir={"addiff_env.configs": "configs"},
)
