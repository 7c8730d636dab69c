"""load: any Mixtral, from the Hub or a folder, as the transformers model itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
from transformers.utils.quantization_config import Mxfp4Config

from mixlens.core.hub import fault_of
from mixlens.errors import BadInput, ModelError, visible
from mixlens.models.converted import converted
from mixlens.models.decoding import AUTO, register
from mixlens.models.demo import DEMO, demo_path
from mixlens.models.hub import commit_of, safetensors_of
from mixlens.models.layout import check_config, config_of, moe_layers, n_experts, top_k
from mixlens.models.provenance import audit
from mixlens.models.quantization.checkpoint import Checkpoint, fill, finish, skeleton_of
from mixlens.models.quantization.compressed_tensors import compressed_format
from mixlens.models.quantization.gptq_awq import packed_format

# How a checkpoint that is quantized already is read, by its quant_method.
_FORMATS = {"gptq": packed_format, "awq": packed_format, "compressed-tensors": compressed_format}
# Those that transformers reads, experts included, and of which families: fp8 by blocks, mxfp4 made whole again.
_LEFT_TO_TRANSFORMERS = {"fp8": None, "mxfp4": ("gpt_oss",)}
# Names of tensors that belong to packed or scaled weights.
_SCALES = ("scale", "scales", "scale_inv", "qweight", "qzeros", "zero_point", "packed", "blocks")


def load(
    model: str | os.PathLike[str],
    *,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    experts: str | None = None,
    quantization: str | Mapping[str, str] | None = None,
    verbose: bool = True,
) -> Any:
    """Load a Mixtral, or another mixture of experts of transformers, as the transformers model itself.

    docs/models.md lists the families, and what mixlens does with each.

    Only safetensors are read and no code of the repository is run.

    Schemes: nf4 and int8 (bitsandbytes; int8 is LLM.int8(), which rounds activations too), int4wo, int8wo and fp8
    (torchao; weight-only but for fp8, which needs a GPU that has it), hqq4, hqq3 and hqq2 (HQQ). A group size of
    one's own is written hqq2-g16. A mapping gives a scheme, or "none", to "attention", "experts", "shared" (experts),
    "dense" (layers), "router", "head" or a pattern on module names, and later entries win: {"attention": "nf4",
    "experts": "hqq2", "*.layers.0.*": "none"}. Routers and the head keep `dtype` unless they are named. Experts become
    Linears, one for each matrix, so that quantization reaches them; transformers' own passes them by. Each weight is
    quantized as it is read, on its device, so that the model never stands in memory unquantized.
    `mixlens.audit(model)` counts what came of it. Checkpoints in GPTQ and AWQ are recognised and need no
    quantization=.

    Parameters
    ----------
    model : str or os.PathLike
        A Hub id, a folder, or "demo" for the small trained model inside the package.
    device_map : str or Mapping[str, Any], optional
        As in accelerate: "auto" spreads layers over GPUs, then memory, then disk; a dict names places. None is
        "auto" where there is an accelerator, else the CPU. Layers sent to disk are kept in a temporary folder,
        gone with the model; the environment variable TMPDIR says where.
    dtype : str or torch.dtype, optional
        None is the checkpoint's own on an accelerator and float32 on a CPU.
    revision : str, optional
        Branch, tag or commit on the Hub.
    experts : str, optional
        Transformers' experts implementation; None picks its fastest for the device. "auto" decodes single tokens by a
        kernel of mixlens' own on CUDA with Triton, and all else as None does. :func:`mixlens.compiled_decoding` is
        faster still.
    quantization : str or Mapping[str, str], optional
        None for the weights as they are, or a scheme for all but routers and head, or a mapping (above).
    verbose : bool, optional
        Show progress, and print one line on what was loaded, and how, to stderr.

    Returns
    -------
    Any

    Raises
    ------
    ModelError
        If it is no mixture of experts, is a Mixtral with a sliding window, lacks weights, cannot be reached, is
        quantized already in another way, does not fit into memory (with the bytes needed and had, before anything is
        loaded), or when a scheme's package or hardware is not here.
    BadInput
        For schemes, patterns and group sizes that cannot be.

    Examples
    --------
    >>> type(ml.load("demo", verbose=False)).__name__
    'MixtralForCausalLM'
    """
    if not isinstance(model, str | os.PathLike):
        raise BadInput(
            f"Cannot load a {type(model).__name__}: models are loaded by name. Pass a name on the Hub, a folder, or "
            f'"{DEMO}".',
            argument="model",
            value=type(model).__name__,
        )
    name = str(demo_path() if model == DEMO else model)
    commit = _commit(name, revision)
    config = _read_config(name, commit)
    check_config(config, str(model))
    if config.model_type != "mixtral" and _method(config) in _FORMATS:
        raise ModelError(
            f"Cannot load {model}: its checkpoint is quantized by {_method(config)}, whose packed experts mixlens "
            f"reads of Mixtral alone, and this is a {config.model_type} model. Load the original with quantization=.",
            argument="quantization",
            value=config.model_type,
        )
    accelerated = torch.accelerator.is_available()
    device_map = device_map if device_map is not None else ("auto" if accelerated else None)
    _check_places(device_map)
    resolved = _resolve_dtype(dtype, config, on_cpu=_places(device_map) <= {"cpu", "disk"})
    source = _Source(name, str(model), config, commit)
    _check_method(source)
    if quantization is None and _method(config) not in _FORMATS:
        loaded = _load_plain(source, device_map, resolved, verbose)
        loaded.set_experts_implementation(_experts(loaded, experts))
    else:
        if experts not in (None, "eager"):
            raise BadInput(
                f"Cannot load a quantized model with experts={experts!r}: its experts are separate Linears, and only "
                "eager computes with them. Leave experts out.",
                argument="experts",
                value=experts,
            )
        loaded = _load_quantized(source, device_map, resolved, quantization, verbose)
    loaded.config._commit_hash = commit  # transformers keeps it no longer; recorded with every run, never saved
    if verbose:
        print(visible(_summary(str(model), loaded)), file=sys.stderr)
    return loaded


@dataclass(frozen=True)
class _Source:
    """Where a model comes from, and what the caller calls it; the revision is a commit of the Hub, None of a folder."""

    name: str
    asked: str
    config: Any
    revision: str | None


def _load_plain(source: _Source, device_map: str | Mapping[str, Any] | None, dtype: torch.dtype, verbose: bool) -> Any:
    _check_memory(source.asked, bytes_needed(source.config, dtype), dtype, device_map)
    options: dict[str, Any] = {
        "dtype": dtype,
        "revision": source.revision,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if _method(source.config) == "mxfp4":
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    temporary = None
    if device_map not in (None, "cpu"):  # only then can layers go to disk
        options["offload_folder"] = temporary = tempfile.mkdtemp(prefix="mixlens-offload-")
    try:
        with progress_bar(shown=verbose):
            read: Any = AutoModelForCausalLM.from_pretrained(
                source.name, config=source.config, device_map=device_map, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise _weights_error(source, error) from error
    loaded, info = read
    if temporary is not None:
        weakref.finalize(loaded, shutil.rmtree, temporary, ignore_errors=True)
    _refuse_unlabelled(source, info["unexpected_keys"])
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"Cannot load {source.asked}: its checkpoint lacks {len(missing)} weights ({', '.join(missing[:3])} ...), "
            "which transformers would leave random. Complete the checkpoint, or download it again.",
            argument="weights",
            value=sorted(missing),
        )
    return loaded.eval()


def _load_quantized(
    source: _Source,
    device_map: str | Mapping[str, Any] | None,
    dtype: torch.dtype,
    quantization: str | Mapping[str, str] | None,
    verbose: bool,
) -> Any:
    held = _method(source.config)
    if held is not None and quantization not in (None, held):
        raise ModelError(
            f"Cannot load {source.asked} with quantization={quantization!r}: it is already quantized, by {held}. "
            "Leave quantization out, or pass the checkpoint that it was made from.",
            argument="quantization",
            value=quantization,
        )
    try:
        if source.config.model_type != "mixtral":
            return _load_converted(source, device_map, dtype, cast(Any, quantization), verbose)
        checkpoint = _find(source)
        if held is None:
            _refuse_unlabelled(source, checkpoint.tensors)
        packed = None
        if held is not None:
            packed = _FORMATS[held](source.asked, dict(source.config.quantization_config), list(checkpoint.tensors))
        skeleton = skeleton_of(source.config, quantization if held is None else None, dtype, packed)
        _check_memory(source.asked, skeleton.bytes_needed, dtype, device_map)
        return finish(
            fill(skeleton, checkpoint, skeleton.places(device_map), verbose=verbose), source.name, source.revision
        )
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        raise _weights_error(source, error) from error


def _load_converted(
    source: _Source,
    device_map: str | Mapping[str, Any] | None,
    dtype: torch.dtype,
    quantization: str | Mapping[str, str],
    verbose: bool,
) -> Any:
    """Of a family whose checkpoint transformers rearranges when it loads it."""
    try:
        made = converted(source.name, source.asked, source.config, source.revision, dtype, quantization)
        with progress_bar(shown=verbose), made as (skeleton, weights):
            _check_memory(source.asked, skeleton.bytes_needed, dtype, device_map)
            loaded = fill(skeleton, weights, skeleton.places(device_map), verbose=verbose)
    except BadInput:
        raise
    except ValueError as error:
        raise _weights_error(source, error) from error
    return finish(loaded, source.name, source.revision)


def _find(source: _Source) -> Checkpoint:
    try:
        return Checkpoint.find(source.name, source.revision)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"Cannot load {source.asked}: its model.safetensors.index.json is broken: {_first_line(error)}. Restore "
            "the file from the original repository.",
            argument="model.safetensors.index.json",
            value=source.asked,
        ) from error


def _method(config: Any) -> str | None:
    """What a checkpoint is quantized by already, as its config says."""
    held = getattr(config, "quantization_config", None)
    return None if held is None else str(dict(held).get("quant_method", "an unknown method")).lower()


def _check_method(source: _Source) -> None:
    """Raises ModelError for a checkpoint whose experts nobody here would read as they are stored."""
    method, family = _method(source.config), source.config.model_type
    families = _LEFT_TO_TRANSFORMERS.get(str(method), ())
    if method not in (None, *_FORMATS) and families is not None and family not in families:
        raise ModelError(
            f"Cannot load {source.asked}: its config.json says that it is quantized by {method}, and it is a {family} "
            f"model. mixlens reads checkpoints quantized by {', '.join(_FORMATS)} and fp8, and gpt_oss in mxfp4: get "
            'one of these, or load the original with quantization="nf4" or another scheme.',
            argument="quantization",
            value=method,
        )


def _refuse_unlabelled(source: _Source, names: Iterable[str]) -> None:
    """Raises ModelError for packed or scaled weights of which config.json says nothing: they mean other numbers."""
    if _method(source.config) is None and (found := sorted(n for n in names if n.endswith(_SCALES))):
        raise ModelError(
            f"Cannot load {source.asked}: its files hold quantized weights ({', '.join(found[:3])} ...), and its "
            "config.json has no quantization_config. Get the checkpoint in a form whose config.json says how it is "
            "quantized, or load the original with quantization=.",
            argument="quantization",
            value=found[:3],
        )


def skeleton(model: str | os.PathLike[str], *, revision: str | None = None, dtype: Any = None) -> Any:
    """The model on the device meta: its modules, config and name, and no weights. Raises as load does."""
    name = str(demo_path() if model == DEMO else model)
    commit = _commit(name, revision)
    config = _read_config(name, commit)
    check_config(config, str(model))
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=_resolve_dtype(dtype, config, on_cpu=True))
    made.name_or_path, made.config._commit_hash = name, commit
    return made


def bytes_needed(config: Any, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model with this config, counted without making any.

    Raises ModelError where transformers makes no mixture of experts of it.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"Cannot load a {config.model_type} model: {_first_line(error)}. Load the model yourself, and pass it to "
            "mixlens.",
            argument="model_type",
            value=config.model_type,
        ) from error
    moe_layers(skeleton)
    return sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize


def _commit(name: str, revision: str | None) -> str | None:
    """The commit that everything of a model on the Hub is read at; None for a folder."""
    _refuse_other_files(name)
    if Path(name).is_dir():
        return None
    try:
        return commit_of(name, revision)
    except Exception as error:  # the client has a class of its own for every way of not getting there
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> ModelError:
    found, do = fault_of(error) or (_first_line(error), "Check the name and the network, or give a local folder.")
    return ModelError(
        f"Cannot load {name}: it is not a folder here, and the Hub did not provide it: {found}. {do}",
        argument="model",
        value=name,
    )


def _refuse_other_files(name: str) -> None:
    """Raises ModelError for files that users keep beside checkpoints, and that are none."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    if path.is_dir() and (path / "config.json").exists():
        return
    if any(file.suffix == ".gguf" or (file.is_file() and _begins_with(file, b"GGUF")) for file in files):
        raise ModelError(
            f"Cannot load {name}: it is a GGUF file, which llama.cpp reads, and its experts would have to be "
            "converted back. Load the checkpoint it was made from, or serve it with llama.cpp and pass an ml.Endpoint.",
            argument="model",
            value="gguf",
        )
    if (path / "adapter_config.json").exists():
        base = json.loads((path / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        raise ModelError(
            f"Cannot load {name}: it is an adapter of PEFT for {base}, not a model. Load {base} with ml.load, then "
            f"apply peft.PeftModel.from_pretrained(model, {name!r}).",
            argument="model",
            value="adapter",
        )
    if path.is_file():
        raise ModelError(
            f"Cannot load {name}: it is a file. Pass the folder that holds config.json and the safetensors files.",
            argument="model",
            value=name,
        )


def _begins_with(file: Path, magic: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(magic)) == magic


def _read_config(name: str, commit: str | None) -> Any:
    if commit is None and not (Path(name) / "config.json").exists():
        raise ModelError(
            f"Cannot load {name}: the folder has no config.json. Pass the folder that holds config.json and the "
            "safetensors files.",
            argument="config.json",
            value=name,
        )
    try:
        return AutoConfig.from_pretrained(name, revision=commit or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "custom code" in str(error):
            raise ModelError(
                f"Cannot load {name}: it needs to run code of its own, which mixlens never does. Pass a checkpoint of "
                "transformers' own Mixtral (model_type mixtral, no auto_map).",
                argument="trust_remote_code",
                value=name,
            ) from error
        if commit is not None and fault_of(error) is not None:
            raise _hub_error(name, error) from error
        raise ModelError(
            f"Cannot load {name}: its config.json cannot be read: {_first_line(error)}. Restore the file from the "
            "original repository.",
            argument="config.json",
            value=_first_line(error),
        ) from error


def _weights_error(source: _Source, error: Exception) -> ModelError:
    found = _first_line(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return ModelError(
            f"Cannot load {source.asked}: memory ran out while its weights were read: {found}. Free memory, load it "
            'with quantization="nf4", or spread it with device_map="auto".',
            argument="memory",
            value=found,
        )
    if source.revision is not None and fault_of(error) is not None:
        return _hub_error(source.asked, error)
    if source.revision is not None and "named model.safetensors" in str(error):
        try:  # transformers says it of a Hub that is out of reach, too
            listed = safetensors_of(source.name, source.revision)
        except Exception as unreached:
            return _hub_error(source.asked, unreached)
        found = f"the Hub has {listed[0]} and did not give it" if listed else "it has no safetensors"
    return ModelError(
        f"Cannot load {source.asked}: its weights cannot be read: {found}. Make sure that all safetensors files of "
        "the checkpoint are present and complete; pickled weights (.bin) are not read.",
        argument="weights",
        value=found,
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:300] or type(error).__name__


def _resolve_dtype(dtype: str | torch.dtype | None, config: Any, *, on_cpu: bool) -> torch.dtype:
    if dtype is None:
        return torch.float32 if on_cpu else (getattr(config, "dtype", None) or torch.bfloat16)
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(
            f"Cannot load a model with dtype={dtype!r}. Pass float32, bfloat16 or float16.",
            argument="dtype",
            value=dtype,
        )
    return resolved


def _check_memory(name: str, needed: int, dtype: torch.dtype, device_map: str | Mapping[str, Any] | None) -> None:
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
            f'Cannot load {name} onto {", ".join(named)}: torch sees no CUDA device here. Pass device_map="cpu", or '
            "leave device_map out.",
            argument="device_map",
            value=named,
        )
    had = {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in gpus}
    if spread or "cpu" in places:
        had["cpu"] = psutil.virtual_memory().available
    if had and needed > sum(had.values()):
        free = ", ".join(f"{place} {amount / 2**30:.1f} GiB" for place, amount in had.items())
        raise ModelError(
            f"Cannot load {name} in {str(dtype).removeprefix('torch.')}: its weights need {needed:,} bytes "
            f"({needed / 2**30:.1f} GiB), and {sum(had.values()):,} are free ({free}). Free memory, use a smaller "
            'dtype, or pass a device_map with "disk" for some layers.',
            argument="memory",
            value=needed,
        )


def _places(device_map: str | Mapping[str, Any] | None) -> set[str]:
    return set(map(str, device_map.values())) if isinstance(device_map, Mapping) else {str(device_map or "cpu")}


def _check_places(device_map: str | Mapping[str, Any] | None) -> None:
    spread = {"auto", "balanced", "balanced_low_0", "sequential", "disk"}
    for place in {place for place in _places(device_map) - spread if not place.isdigit()}:
        try:
            torch.device(place)
        except RuntimeError as error:
            raise BadInput(
                f'Cannot load a model with device_map={device_map!r}: torch knows no device {place!r}. Pass "auto", '
                'a device such as "cuda:0" or "cpu", or a mapping from modules to devices.',
                argument="device_map",
                value=place,
            ) from error


def _cuda_index(place: str) -> int | None:
    if place.isdigit():
        return int(place)
    kind, _, number = place.partition(":")
    return int(number or 0) if kind == "cuda" else None


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[None]:
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
    if asked == AUTO:
        register()
    try:
        return model.get_correct_experts_implementation(asked or "grouped_mm")
    except (ValueError, ImportError) as error:
        if asked is None:
            return "eager"
        raise BadInput(
            f"Cannot load a model with experts={asked!r}: {_first_line(error)}. Pass one of auto, eager, grouped_mm "
            "and batched_mm, or leave experts out for the fastest of transformers.",
            argument="experts",
            value=asked,
        ) from error


def _summary(name: str, model: Any) -> str:
    config, audited = config_of(model), audit(model)
    devices = sorted({"offloaded" if p.is_meta else str(p.device) for p in model.parameters()})
    experts = config._experts_implementation
    decode = " (batched_mm in generate's decode)" if experts == "grouped_mm" and model.device.type != "cpu" else ""
    dtype = str(model.dtype).removeprefix("torch.")
    held = dtype if audited.label == dtype else f"{audited.label} ({audited.bytes:,} bytes), the rest {dtype}"
    return (
        f"{name}: {audited.weights:,} parameters, {config.num_hidden_layers} layers, "
        f"top-{max(top_k(model).values())} of {n_experts(model)} experts, "
        f"{held} on {', '.join(devices)}, experts by {experts}{decode}"
    )
