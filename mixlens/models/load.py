"""load: any Mixtral, from the Hub or a folder, as the transformers model itself."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from mixlens.errors import BadInput, ModelError
from mixlens.models.demo import DEMO, demo_path
from mixlens.models.layout import check_config


def load(
    model: str | os.PathLike,
    *,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    experts: str | None = None,
    offload_folder: str | os.PathLike | None = None,
    verbose: bool = True,
) -> Any:
    """A Mixtral as `MixtralForCausalLM`, ready to be read from.

    model       a Hub id, a folder, or "demo" for the small trained model inside the package
    device_map  as in accelerate: "auto" spreads layers over GPUs, then memory, then disk; a dict names places. None is
                "auto" where there is an accelerator, else the CPU
    dtype       None is the checkpoint's own on an accelerator and float32 on a CPU
    revision    branch, tag or commit on the Hub
    experts     transformers' experts implementation; None picks the fastest for the device
    offload_folder  where layers that device_map sends to disk are kept; None is a temporary folder, gone with the model
    verbose     show progress, and print one line on what was loaded, and how, to stderr

    Only safetensors are read and no code of the repository is run.

    Raises ModelError when it is not a Mixtral, has a sliding window, lacks weights, cannot be reached or does not fit
    into memory (with the bytes needed and had, before anything is loaded).
    """
    name = str(demo_path() if model == DEMO else model)
    config = _read_config(name, revision)
    check_config(config, str(model))
    accelerated = torch.accelerator.is_available()
    device_map = device_map if device_map is not None else ("auto" if accelerated else None)
    resolved = _resolve_dtype(dtype, config, on_cpu=_places(device_map) <= {"cpu", "disk"})
    _check_memory(str(model), config, resolved, device_map)
    options: dict[str, Any] = {
        "dtype": resolved,
        "revision": revision,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    temporary = None
    if device_map not in (None, "cpu"):  # only then can layers go to disk
        temporary = tempfile.mkdtemp(prefix="mixlens-offload-") if offload_folder is None else None
        options["offload_folder"] = temporary or offload_folder
    try:
        with _progress_bar(shown=verbose):
            read: Any = AutoModelForCausalLM.from_pretrained(
                name, config=config, device_map=device_map, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _weights_error(str(model), error) from error
    loaded, info = read
    if temporary is not None:
        weakref.finalize(loaded, shutil.rmtree, temporary, ignore_errors=True)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{model} was to be loaded. Its checkpoint lacks {len(missing)} weights ({', '.join(missing[:3])} ...); "
            "transformers would leave them random. Complete the checkpoint, or download it again."
        )
    loaded.eval()
    loaded.set_experts_implementation(_experts(loaded, experts))
    if verbose:
        print(_summary(str(model), loaded), file=sys.stderr)
    return loaded


def bytes_needed(config: Any, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model with this config, counted without making any."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize


def _read_config(name: str, revision: str | None) -> Any:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ModelError(
            f"{name} was to be loaded. The folder has no config.json. Give the folder that holds config.json and the "
            "safetensors files."
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if folder.is_dir():
            raise ModelError(
                f"{name} was to be loaded. Its config.json cannot be read: {_first_line(error)}. "
                "Restore the file from the original repository."
            ) from error
        raise ModelError(
            f"{name} was to be loaded. It is no folder here, and the Hub did not give its config: "
            f"{_hub_reason(error)}. Check the name, the network and, for a gated model, `hf auth login`; or give a "
            "local folder."
        ) from error


def _hub_reason(error: BaseException) -> str:
    reasons = {
        "GatedRepoError": "access to the repository is restricted",
        "RepositoryNotFoundError": "there is no such repository",
        "RevisionNotFoundError": "there is no such revision",
        "OfflineModeIsEnabled": "the Hub is switched off (HF_HUB_OFFLINE)",
        "LocalEntryNotFoundError": "the Hub cannot be reached, and nothing is cached",
        "ConnectError": "the Hub cannot be reached",
        "ConnectionError": "the Hub cannot be reached",
    }
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in reasons:
            return reasons[type(cause).__name__]
        cause = cause.__cause__ or cause.__context__
    return _first_line(error)


def _weights_error(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"{name} was to be loaded. Its weights could not be read: {_first_line(error)}. Make sure that all "
        "safetensors files of the checkpoint are there and whole; pickled weights (.bin) are not read."
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300] or type(error).__name__


def _resolve_dtype(dtype: str | torch.dtype | None, config: Any, *, on_cpu: bool) -> torch.dtype:
    if dtype is None:
        return torch.float32 if on_cpu else (getattr(config, "dtype", None) or torch.bfloat16)
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(
            f"A model was to be loaded with dtype={dtype!r}. Weights are held in float32, bfloat16 or float16. "
            "Give one of them."
        )
    return resolved


def _check_memory(name: str, config: Any, dtype: torch.dtype, device_map: str | Mapping[str, Any] | None) -> None:
    """Compare what the weights need with what is free where they may go; disk counts as endless."""
    places = _places(device_map)
    if "disk" in places:
        return
    spread = bool(places & {"auto", "balanced", "balanced_low_0", "sequential"})
    gpus = (
        range(torch.cuda.device_count()) if spread else sorted({i for p in places if (i := _cuda_index(p)) is not None})
    )
    if (named := sorted(p for p in places if _cuda_index(p) is not None)) and not torch.cuda.is_available():
        raise ModelError(
            f'{name} was to be loaded onto {", ".join(named)}. torch sees no CUDA device here. Give device_map="cpu", '
            "or nothing for the best place there is."
        )
    had = {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in gpus}
    if spread or "cpu" in places:
        had["cpu"] = psutil.virtual_memory().available
    needed = bytes_needed(config, dtype)
    if had and needed > sum(had.values()):
        free = ", ".join(f"{place} {amount / 2**30:.1f} GiB" for place, amount in had.items())
        raise ModelError(
            f"{name} was to be loaded in {str(dtype).removeprefix('torch.')}. Its weights need {needed:,} bytes "
            f"({needed / 2**30:.1f} GiB), and {sum(had.values()):,} are free ({free}). Free memory, use a smaller "
            'dtype, or give a device_map with "disk" for some layers.'
        )


def _places(device_map: str | Mapping[str, Any] | None) -> set[str]:
    return set(map(str, device_map.values())) if isinstance(device_map, Mapping) else {str(device_map or "cpu")}


def _cuda_index(place: str) -> int | None:
    if place.isdigit():
        return int(place)
    kind, _, number = place.partition(":")
    return int(number or 0) if kind == "cuda" else None


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[None]:
    """transformers' own bar, which in a saved notebook is a widget without its state."""
    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _experts(model: Any, asked: str | None) -> str:
    """The experts implementation to use: the one asked for, else the fastest that runs.

    grouped_mm reads prompts fastest everywhere, and generate itself decodes with batched_mm on an accelerator. Where
    grouped_mm does not run, the loop over experts does.
    """
    try:
        return model.get_correct_experts_implementation(asked or "grouped_mm")
    except (ValueError, ImportError) as error:
        if asked is None:
            return "eager"
        raise BadInput(
            f"A model was to be loaded with experts={asked!r}. transformers says: {_first_line(error)}. "
            "Give one of eager, grouped_mm and batched_mm, or nothing for the fastest."
        ) from error


def _summary(name: str, model: Any) -> str:
    config = model.config
    devices = sorted({"offloaded" if p.is_meta else str(p.device) for p in model.parameters()})
    experts = config._experts_implementation
    decode = " (batched_mm in generate's decode)" if experts == "grouped_mm" and model.device.type != "cpu" else ""
    return (
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.num_hidden_layers} layers, "
        f"top-{config.num_experts_per_tok} of {config.num_local_experts} experts, "
        f"{str(model.dtype).removeprefix('torch.')} on {', '.join(devices)}, experts by {experts}{decode}"
    )
