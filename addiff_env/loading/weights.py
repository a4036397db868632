"""Where frozen models come from: packaged folders, dtypes, and loading them without noise."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import GatedRepoError
from transformers.utils import logging as transformers_logging

from addiff_env.loading.damage import wrong_at
from addiff_env.loading.isolation import exclusive
from addiff_env.loading.paths import looked_at, resolve_model

_GATED = ("black-forest-labs/",)  # whose models need an accepted licence
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(dtype: str, device: str) -> str:
    """The name of the dtype to use; ``auto`` is bfloat16 where the hardware multiplies it fast, else float32.

    Of CUDA devices those before Ampere (compute capability below 8) only emulate bfloat16: there it is float16.

    Raises:
        ValueError: unknown name.
    """
    if dtype == "auto":
        if device.startswith("cuda"):
            return "bfloat16" if torch.cuda.get_device_capability(device)[0] >= 8 else "float16"
        return "bfloat16" if _cpu_multiplies_bfloat16() else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return dtype


def _cpu_multiplies_bfloat16() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.9 and its like
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()  # AVX-512's dot products count too: AMD has no AMX
    return bool(capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False))


def resolve_device(device: str) -> str:
    """The device to use; ``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: not a device, or one that this machine does not have.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # "meta" computes, but has no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} is not to be had here: {str(error)[:200]}") from error
    return device


# What the libraries say while a model loads and what is of no use to anybody, as `load_network` reads their reports.
_NOISE = re.compile(
    r"^Expected types for \w+:"  # the embedded world's autoencoder is a small one
    r"|^The config attributes {'block_out_channels'"  # which diffusers itself writes into such an autoencoder's
    r"|^You have disabled the safety checker|^Keyword arguments {'safety_checker'"  # which not every pipeline has
    r"|^Could(n't| not) (reach|connect to) the Hub"  # what is not in the cache either cannot be loaded, and is an error
    r"|^No LoRA keys associated to|^Loading adapter weights from state_dict led to"  # what is left over is refused
    r"|^Some weights of .* were not (used when initializing|initialized from)"
    r"|LOAD REPORT"
)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Load a model: one at a time in the process (`exclusive`), without progress bars and what is known to be noise."""
    libraries = (diffusers_logging, transformers_logging)
    with exclusive(), ExitStack() as undo:
        for library in libraries:
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                undo.callback(library.enable_progress_bar)
        for handler in {h for name in ("diffusers", "transformers", "") for h in logging.getLogger(name).handlers}:
            handler.addFilter(_is_no_noise)
            undo.callback(handler.removeFilter, _is_no_noise)
        yield


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not (record.name.startswith(("diffusers.", "transformers.")) and _NOISE.search(record.getMessage()))


# Tensors that a checkpoint may lack, or hold beside what its network needs, without anything being wrong with it:
# counters, and tables that the network computes. Older versions of the libraries saved them.
_COMPUTED = re.compile(r"(^|\.)(position_ids|num_batches_tracked|relative_position_index|inv_freq)$")


def load_network(loader: Any, model: str | Path, *, may_lack: str | None = None, **options: Any) -> Any:
    """``loader.from_pretrained`` of diffusers or transformers, and the certainty that all weights are the file's.

    Both libraries give random numbers to what they miss, and leave out what they do not know, with a warning.

    Args:
        loader: a class of networks.
        model: folder or Hub id.
        may_lack: pattern of the tensors that published checkpoints of this kind lack and that are not used.
        options: of ``from_pretrained``.

    Raises:
        ValueError: tensors are missing, not known, of another shape, or hold numbers that are not finite; the message
            names them. Whatever the library raises for files that are not there or damaged.
    """
    if loader.__module__.startswith("transformers."):
        options["ignore_mismatched_sizes"] = True  # else it raises without a name
    try:
        network, report = loader.from_pretrained(model, output_loading_info=True, **options)
    except ValueError as error:  # diffusers' of another shape names no file, and advises to draw the weights
        said = str(error).partition(" If you want")[0]
        raise ValueError(f"{str(model)!r} is no {loader.__name__}: {said}") from error
    problems = {
        "lack {} keys": _relevant(report["missing_keys"], may_lack),
        "hold {} keys that it does not have": _relevant(report["unexpected_keys"]),
        "hold {} keys of another shape": _relevant(map(_with_shapes, report["mismatched_keys"])),
    }
    found = [f"{what.format(len(names))}: {some(names)}" for what, names in problems.items() if names]
    if found:
        kind = type(network).__name__
        raise ValueError(f"{str(model)!r} is not the {kind} that it says: its weights {'; they '.join(found)}")
    check_finite(network.state_dict(), model)
    return network


def check_tokenizer(tokenizer: Any, place: str | Path) -> None:
    """Refuse a tokenizer without a vocabulary: where its files are missing, transformers makes one of nothing.

    Raises:
        ValueError: the message names ``place``.
    """
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:  # T5's has one token more
        raise ValueError(f"{str(place)!r} holds no vocabulary of a {type(tokenizer).__name__}: its files are missing")


def _with_shapes(mismatch: tuple[str, Any, Any]) -> str:
    name, there, here = mismatch
    return f"{name} {tuple(there)} instead of {tuple(here)}"


def _relevant(names: Iterable[str], may_lack: str | None = None) -> list[str]:
    kept = (name for name in names if not _COMPUTED.search(name))
    return sorted(name for name in kept if may_lack is None or not re.search(may_lack, name))


@contextmanager
def fetching(model: str, setting: str) -> Iterator[str]:
    """The folder of a model, or its Hub id; what a library says of one that is not there becomes what to do about it.

    Raises:
        FileNotFoundError: ``model`` is neither a local folder nor to be had from the Hub; names ``setting``.
        ValueError: it is a local folder, and damaged or another model's.
    """
    folder = resolve_model(model)
    try:
        yield folder
    except Exception as error:  # libraries raise whatever a damaged file leads to
        text = f"cannot load {looked_at(model)}: {reason(error)}{wrong_at(folder)}"
        if Path(folder).is_dir():
            raise ValueError(text) from error
        raise FileNotFoundError(f"{text}; download it and pass {setting}") from error


def reason(error: Exception, limit: int = 600) -> str:
    """What an error says, shortened, and without torch's advice to unpickle what is not trusted."""
    text = str(error).split("weights_only")[0].strip()
    shortened = text if len(text) <= limit else text[:limit] + " ..."
    return f"{type(error).__name__}: {shortened}{gated_advice(error)}"


def gated_advice(error: BaseException, model: str = "") -> str:
    """What to do where the Hub refuses a model because its licence has to be accepted first; "" where it is not that.

    Libraries wrap the Hub's refusal in errors of their own. Without a connection nothing says that a model is gated:
    those that are known to be are told by their names.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if not any(isinstance(cause, GatedRepoError) for cause in causes) and not model.startswith(_GATED):
        return ""
    page = f"https://huggingface.co/{model}" if model else "its page on the Hub"
    return f"; it is gated: accept its licence at {page} and run `hf auth login`, or pass a local folder"


def check_finite(weights: Mapping[str, torch.Tensor], place: str | Path) -> None:
    """Refuse weights that a damaged file or an overflow left without a value: every score of theirs would be NaN.

    Raises:
        ValueError: the message names ``place`` and the tensors.
    """
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{str(place)!r} holds numbers that are not finite: {some(broken)}")


def some(names: Sequence[str], number: int = 4) -> str:
    """The first few of ``names``, for a message."""
    return ", ".join(names[:number]) + (", ..." if len(names) > number else "")


def shared(load: Callable[..., T]) -> Callable[..., T]:
    """Make a loader hand out one object per set of (hashable) arguments for as long as somebody holds it.

    When the last holder lets go, the object is freed, as Python frees everything else. Loads go one at a time, so
    that threads that ask for the same object get the same one.
    """
    alive: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()

    @wraps(load)
    def wrapper(*args: Any, **kwargs: Any) -> T:
        key = (args, tuple(sorted(kwargs.items())))
        if (value := alive.get(key)) is None:
            with exclusive():
                if (value := alive.get(key)) is None:
                    value = alive[key] = load(*args, **kwargs)
        return value

    return wrapper
