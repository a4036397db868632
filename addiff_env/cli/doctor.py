"""Say whether an environment can run here, and what to do where it cannot. Nothing is fetched or loaded.

    addiff doctor env=sd15                       a preset, at its own lanes
    addiff doctor env=sdxl num_envs=8 device=cuda dtype=float16 offload=model
    addiff doctor env=AdDiffusion-SD15-v0 model=my/folder

Looks at versions, device, memory, disk and every file that the environment's settings name. Exit status 0: nothing is
in the way. 1: something is; the list at the end says what to do, in order. No network is asked, but with ``--online``
the Hub, for what is not here: whether it is there, and given to you.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from huggingface_hub import HfApi, auth_check, constants, get_token
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

import addiff_env
from addiff_env.cli.chosen import Chosen, add_settings, read_chosen
from addiff_env.env.config import EnvConfig
from addiff_env.env.footprint import LAYOUTS, ROOM, download_bytes, footprint
from addiff_env.env.requirements import required
from addiff_env.loading.memory import GIB, free_memory
from addiff_env.loading.presence import GATED, Found, is_hub_id, look_for
from addiff_env.loading.weights import gated_advice, reason, resolve_device, resolve_dtype
from addiff_env.storage.commands import command_line

DISTRIBUTION = "addiff-env"
FINE, NOTE, WRONG = "ok", "note", "WRONG"
_PATIENCE = 10.0  # seconds for the Hub to answer


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        topic: heading that it stands under.
        state: `FINE`; `NOTE`, worth knowing; `WRONG`, in the way.
        text: what was found.
        todo: what to do about it.
    """

    topic: str
    state: str
    text: str
    todo: str = ""


# --------------------------------------------------------------------------- software


def software(config: EnvConfig) -> Iterator[Finding]:
    """Python and the libraries, against the bounds that the package states and the versions it was tested with."""
    topic = "software"
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(topic, NOTE, f"{DISTRIBUTION} is not installed, only found on the path: versions are not checked")
        return
    bounds = SpecifierSet(about["Requires-Python"] or "")
    fits = platform.python_version() in bounds
    text = f"Python {platform.python_version()} ({bounds})"
    yield Finding(topic, FINE, text) if fits else Finding(topic, WRONG, text, f"use a Python {bounds}")
    tested = dict(_tested_versions())
    for text in about.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _library(topic, requirement, tested.get(_plain(requirement.name)))
    if config.lora is not None and find_spec("peft") is None:
        install = command_line("pip", "install", f"{DISTRIBUTION}[lora]")
        yield Finding(topic, WRONG, f"lora={config.lora!r} needs peft, which is not installed", install)


def _library(topic: str, requirement: Requirement, tested: str | None) -> Finding:
    install = command_line("pip", "install", f"{requirement.name}{requirement.specifier}")
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(topic, WRONG, f"{requirement.name} is not installed ({requirement.specifier or 'any'})", install)
    text = f"{requirement.name} {version}" + f" ({requirement.specifier})" * bool(str(requirement.specifier))
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(topic, WRONG, text, install)
    if tested is not None and tested != version.partition("+")[0]:
        return Finding(topic, NOTE, f"{text}, tested with {tested}")
    return Finding(topic, FINE, text)


def _tested_versions() -> Iterator[tuple[str, str]]:
    """Names and versions of ``constraints.txt``, which a checkout has."""
    path = Path(addiff_env.__file__).resolve().parents[1] / "constraints.txt"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            pinned = Requirement(line.partition("#")[0])
        except InvalidRequirement:
            continue
        if pinned.marker is None or pinned.marker.evaluate():
            yield _plain(pinned.name), next(iter(pinned.specifier)).version


def _plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


# --------------------------------------------------------------------------- device and memory


def device(config: EnvConfig) -> Iterator[Finding]:
    """The device, and what dtype it is good at."""
    topic = "device"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # PyTorch warns where the driver is too old
        try:
            name = resolve_device(config.device)
        except ValueError as error:
            hints = [] if torch.version.cuda else ["this PyTorch was built without CUDA"]
            more = "".join(f" ({hint})" for hint in (*hints, *(warning.message for warning in said)))
            todo = "name another device, e.g. device=cpu, or mend this one's driver"
            yield Finding(topic, WRONG, f"{error}{more}", todo)
            return
    chosen = f"{config.device}, which is {name}" if config.device != name else name
    yield Finding(topic, FINE, f"{chosen}: {_describe(name)}")
    if (
        name.startswith("cuda")
        and _dtype_on(config, name) == "bfloat16"
        and torch.cuda.get_device_capability(name)[0] < 8
    ):
        yield Finding(topic, NOTE, "this card only emulates bfloat16, slowly: dtype=float16 is faster")


def _describe(name: str) -> str:
    if not name.startswith("cuda"):
        return f"{os.cpu_count()} cores, of which PyTorch uses {torch.get_num_threads()}"
    major, minor = torch.cuda.get_device_capability(name)
    total = torch.cuda.get_device_properties(name).total_memory
    return f"{torch.cuda.get_device_name(name)}, compute capability {major}.{minor}, {_gib(total)}"


def _usable(config: EnvConfig) -> str | None:
    """The device's name; None where it is not to be had."""
    try:
        return resolve_device(config.device)
    except ValueError:
        return None


def _dtype_on(config: EnvConfig, name: str | None) -> str:
    """The dtype there; of a device that is not to be had, the half precision that its models are run in."""
    if name is None:
        return "float16" if config.dtype == "auto" else config.dtype
    return resolve_dtype(config.dtype, name)


def memory(chosen: Chosen, config: EnvConfig, files: Sequence[Found]) -> Iterator[Finding]:
    """Free memory against what the environment needs at its lanes."""
    topic, name = "memory", _usable(config)
    host = psutil.virtual_memory().available
    if chosen.env_id not in LAYOUTS:
        weights = sum(_size(found) for found in files)
        text = f"weights {_gib(weights)} on disk (no accounting of {chosen.env_id}'s activations), {_gib(host)} free"
        yield Finding(topic, FINE, text) if host > 2 * weights else Finding(topic, WRONG, text, "free memory")
        return
    dtype, lanes = _dtype_on(config, name), min(chosen.num_envs, config.batch_size)
    accounted = footprint(chosen.env_id, dtype, lanes, (config.height, config.width))
    need = ROOM * accounted.peak_with(config.offload)
    free = None if name is None else free_memory(torch.device(name)) if name.startswith("cuda") else host
    published = "" if config.model == addiff_env.PRESETS[chosen.env_id]["model"] else " (of the id's published layout)"
    what = f"{_gib(need)} for {lanes} lanes a call in {dtype}, offload={config.offload}{published}"
    if free is None:
        yield Finding(topic, NOTE, what)
    elif need <= free:
        yield Finding(topic, FINE, f"{what}; {_gib(free)} free on {name}")
    else:
        yield Finding(
            topic, WRONG, f"{what}; only {_gib(free)} free on {name}", _fit(chosen, config, dtype, free, name)
        )
    if name != "cpu" and accounted.networks > host:
        text = f"{_gib(accounted.networks)} of weights pass through the host, which has {_gib(host)} free"
        yield Finding(topic, WRONG, text, "free memory of the host (of a SLURM job: ADDIFF_MEM)")


def _fit(chosen: Chosen, config: EnvConfig, dtype: str, free: float, name: str | None) -> str:
    """The least change of the settings that fits into ``free`` bytes."""
    size = config.height, config.width
    for offload in ("none",) if name == "cpu" else ("none", "model", "sequential"):
        for lanes in (16, 8, 4, 2, 1):
            accounted = footprint(chosen.env_id, dtype, lanes, size)
            if lanes <= config.batch_size and ROOM * accounted.peak_with(offload) <= free:
                more = "" if offload == "none" else f" offload={offload}"
                return f"batch_size={lanes}{more} fits (any num_envs)"
    return "free memory there, or take a smaller model: nothing that the settings offer fits"


def _size(found: Found) -> int:
    """Bytes of the weights that were found."""
    place = Path(found.detail) if found.is_there else Path()
    files = [place] if place.is_file() else place.rglob("*.safetensors") if found.is_there else ()
    return sum(file.stat().st_size for file in files)


# --------------------------------------------------------------------------- disk and files


def disk(chosen: Chosen, files: Sequence[Found]) -> Iterator[Finding]:
    """Room in the Hub's cache against what is missing of it."""
    cache = Path(constants.HF_HUB_CACHE)
    there = next(place for place in (cache, *cache.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    missing = {found.needed.setting: found.needed.place for found in files if _is_to_fetch(found)}
    own = chosen.env_id in LAYOUTS and {
        name for name, value in addiff_env.PRESETS[chosen.env_id].items() if chosen.settings[name] == value
    }
    known = download_bytes(chosen.env_id) if missing and own else {}
    sizes = {setting: known[setting] for setting in missing if own and setting in own}
    unknown = [place for setting, place in missing.items() if setting not in sizes]
    need = sum(sizes.values())
    text = f"{_gib(free)} free in {cache}"
    if missing:
        text += f", about {_gib(need)} to fetch" + f" (besides {', '.join(unknown)})" * bool(unknown)
    if need < free:
        yield Finding("disk", FINE, text)
    else:
        yield Finding("disk", WRONG, text, "free disk, or let HF_HOME name another one")


def _is_to_fetch(found: Found) -> bool:
    """Whether it is something of the Hub that is not here."""
    return not found.is_there and bool(found.needed.fetch) and is_hub_id(found.needed.place)


def models(files: Sequence[Found]) -> Iterator[Finding]:
    """Every file and repository that the settings name."""
    for found in files:
        needed = found.needed
        text = f"{needed.setting}: {needed.place}: {found.state}"
        if found.is_there:
            yield Finding("files", FINE, text)
        else:
            yield Finding("files", WRONG, f"{text}: {found.detail}", _get(found))


def _get(found: Found) -> str:
    needed = found.needed
    if found.state == GATED:
        return gated_advice(OSError(), needed.place).lstrip("; ") + f"; then: {needed.fetch}"
    if _is_to_fetch(found):
        return f"with a network: {needed.fetch}"
    return f"{needed.setting}={needed.place}: put there what is {found.state}, or name another place"


def hub(files: Sequence[Found]) -> Iterator[Finding]:
    """What keeps missing repositories from being fetched."""
    to_fetch = [found for found in files if _is_to_fetch(found)]
    if to_fetch and constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set: nothing is fetched in this environment"
        yield Finding("files", WRONG, text, "unset HF_HUB_OFFLINE where there is a network, for what follows")
    if any(found.state == GATED for found in to_fetch) and get_token() is None:
        yield Finding("files", NOTE, "nobody is signed in to the Hub, which a gated model needs")


def ask_hub(files: Sequence[Found]) -> Iterator[Finding]:
    """What the Hub says of the repositories that are not here."""
    if constants.HF_HUB_OFFLINE:
        return  # said by `hub`
    for place, revision in dict.fromkeys((f.needed.place, f.needed.revision) for f in files if _is_to_fetch(f)):
        try:
            HfApi().model_info(place, revision=revision, timeout=_PATIENCE)
            auth_check(place)
        except Exception as error:  # whatever a network does: this is to tell, not to fail
            todo = f"see what the Hub says of {place!r}, or whether there is a network"
            yield Finding("files", WRONG, f"the Hub does not give {place!r}: {reason(error, 200)}", todo)
        else:
            yield Finding("files", FINE, f"the Hub gives {place!r}")


# --------------------------------------------------------------------------- the command


def examine(chosen: Chosen, online: bool = False) -> list[Finding]:
    """Everything that was found, in the order in which it is to be mended.

    Raises:
        ValueError: settings that are wrong in themselves.
    """
    config = chosen.config
    files = [look_for(needed) for needed in required(config)]
    return [
        *software(config),
        *device(config),
        *memory(chosen, config, files),
        *disk(chosen, files),
        *hub(files),
        *(ask_hub(files) if online else ()),
        *models(files),
    ]


def report(chosen: Chosen, findings: Sequence[Finding]) -> str:
    """The findings as text, and what to do about them."""
    c = chosen.config
    lines = [f"{chosen.env_id}: {chosen.num_envs} lanes, device {c.device}, dtype {c.dtype}, {c.height} x {c.width}"]
    for topic in dict.fromkeys(finding.topic for finding in findings):
        lines += ["", topic]
        lines += [f"  {finding.state:<5}  {finding.text}" for finding in findings if finding.topic == topic]
    todo = dict.fromkeys(finding.todo for finding in findings if finding.state == WRONG)
    if not todo:
        return "\n".join([*lines, "", "nothing is in the way"])
    return "\n".join([*lines, "", "what to do, in this order", *(f"  {n}. {what}" for n, what in enumerate(todo, 1))])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="addiff doctor", description=(__doc__ or "").split("\n")[0])
    add_settings(parser)
    parser.add_argument("--online", action="store_true", help="ask the Hub for what is not here")
    options = parser.parse_intermixed_args(argv)
    chosen = read_chosen(options.settings)
    findings = examine(chosen, options.online)
    print(report(chosen, findings))
    return int(any(finding.state == WRONG for finding in findings))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"
