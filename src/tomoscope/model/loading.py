"""open_model: from a hub id, a local directory or a module to a subject, with every check before the long work.

Only safetensors are read and only transformers' own code is run, unless the caller allows otherwise by name. A
directory is checked before a weight is loaded: the config is there and names a class, every weights file is whole (its
header is read and compared with its length), and after loading every shape is the config's and every number is finite.
"""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tomoscope.errors import CorruptModelError, ModelError, ModelNotFoundError, ResourceError, UnsafeFormatError
from tomoscope.model.opening import build_subject
from tomoscope.model.subject import Subject

EMBEDDED = Path(__file__).parent / "embedded"
"""The directory of the small trained model that comes with tomoscope; `card.json` in it says how it was made."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "merges.txt",
)  # fmt: skip
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def open_model(
    source: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    example: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    attention: str | None = None,
    allow_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Subject:
    """Open a model for examination.

    Args:
        source: a hub id ("gpt2"), a local directory, or a module in memory.
        tokenizer: overrides the one beside the weights.
        example: inputs for the probe forward; needed for a module without a transformers config.
        device: where to run; a module in memory stays where it is.
        dtype: "float32", "bfloat16", ...; the checkpoint's own by default.
        revision: of a hub id.
        attention: "sdpa", "eager", ...; the library's choice by default.
        allow_remote_code: run code that comes with the checkpoint. It can do anything to this machine.
        allow_pickle: read pickled weights. A pickle can run code.

    Raises:
        ModelNotFoundError: nothing there.
        UnsafeFormatError: only pickled weights, or code of its own, without permission.
        CorruptModelError: truncated files, shapes that are not the config's, weights that are not finite.
        ResourceError: the device is not there.
    """
    if isinstance(source, nn.Module):
        return build_subject(source, tokenizer=tokenizer, example=example)
    place = _device(device)
    wanted = _dtype(dtype)
    directory = Path(source)
    local = directory.is_dir()
    if local:
        check_directory(directory, allow_remote_code=allow_remote_code, allow_pickle=allow_pickle)
    elif directory.exists():
        raise ModelNotFoundError(f"{source} is a file, not a model directory.", remedy="Give the directory around it.")
    elif isinstance(source, Path) or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise ModelNotFoundError(f"There is no directory {source}.", remedy="Check the path.")
    model = _load(str(source), wanted, revision, attention, allow_remote_code, allow_pickle)
    model.to(place)
    if tokenizer is None:
        tokenizer = _tokenizer(str(source), revision, local)
    name = directory.name if local else str(source)
    return build_subject(model, tokenizer=tokenizer, name=name, source=str(source), example=example)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ResourceError(
            f"The device {device!r} is not there: {error}.", remedy="Use cpu, or see tomoscope doctor."
        ) from error
    return place


def _dtype(dtype: str | torch.dtype | None) -> Any:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown.", remedy=f"It is one of {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def check_directory(directory: Path, *, allow_remote_code: bool = False, allow_pickle: bool = False) -> None:
    """Check a model directory before anything is loaded; see `open_model` for what it raises."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{directory} holds no config.json, so it is no model directory.",
            remedy="Save the model with save_pretrained.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptModelError(f"{path} is no JSON: {error}.", remedy="Copy the file again.") from error
    if not isinstance(config, dict):
        raise CorruptModelError(f"{path} holds a {type(config).__name__}, not a config.", remedy="Copy the file again.")
    if config.get("auto_map") and not allow_remote_code and not _native(config):
        raise UnsafeFormatError(
            f"{directory} wants to run code of its own ({next(iter(config['auto_map'].values()))}), which tomoscope "
            f"does not do.",
            remedy="Read that code, then pass allow_remote_code=True if you trust it.",
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for pattern in _PICKLES for p in directory.glob(pattern)]
        if not pickled:
            raise ModelNotFoundError(
                f"{directory} holds no weights (*.safetensors).", remedy="Save the model with save_pretrained."
            )
        if not allow_pickle:
            raise UnsafeFormatError(
                f"{directory} holds only pickled weights ({pickled[0]}); unpickling can run any code.",
                remedy="Convert them with save_pretrained(safe_serialization=True), or pass allow_pickle=True if you "
                "trust them.",
            )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        absent = sorted(shards - {p.name for p in weights})
        if absent:
            raise CorruptModelError(
                f"{directory} lacks {len(absent)} of {len(shards)} weight files, first {absent[0]}.",
                remedy="Copy them too.",
            )
    for file in weights:
        check_safetensors(file)


def _native(config: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def check_safetensors(file: Path) -> None:
    """Compare a safetensors file's header with its length.

    Raises:
        CorruptModelError: no readable header, or fewer or more bytes than the header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptModelError(
            f"{file} is no whole safetensors file: {error}.", remedy="Copy or download it again."
        ) from error
    if 8 + length + end != size:
        raise CorruptModelError(
            f"{file} has {size} bytes, but its header tells of {8 + length + end}: it is truncated or damaged.",
            remedy="Copy or download it again.",
        )


def _load(
    source: str, dtype: Any, revision: str | None, attention: str | None, remote: bool, pickled: bool
) -> nn.Module:
    import transformers

    options: dict[str, Any] = {"trust_remote_code": remote}
    if revision is not None:
        options["revision"] = revision
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        cls = _model_class(transformers, config)
        if attention is not None:
            options["attn_implementation"] = attention
        quiet = importlib.import_module("transformers.utils.logging")
        level, bars = quiet.get_verbosity(), quiet.is_progress_bar_enabled()
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        try:
            model, info = cls.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
                use_safetensors=None if pickled else True, **options,
            )  # fmt: skip
        finally:
            quiet.set_verbosity(level)
            if bars:
                quiet.enable_progress_bar()
    except OSError as error:
        if Path(source).is_dir():
            raise CorruptModelError(f"{source} could not be loaded: {_first_line(error)}") from error
        raise ModelNotFoundError(
            f"{source!r} is neither a local directory nor a model that could be fetched: {_first_line(error)}",
            remedy="Check the name and the network, or give a local directory.",
        ) from error
    except (ValueError, KeyError, RuntimeError, AttributeError, TypeError, ZeroDivisionError, ImportError) as error:
        raise CorruptModelError(
            f"{source} could not be built from its config: {type(error).__name__}: {_first_line(error)}",
            remedy="The config may be damaged, or need a newer transformers.",
        ) from error
    _check_loaded(source, info)
    return model


def _model_class(transformers: Any, config: Any) -> Any:
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if cls is not None and hasattr(cls, "from_pretrained"):
            return cls
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return transformers.AutoModelForCausalLM if config.model_type in mapping else transformers.AutoModel


def _check_loaded(source: str, info: dict[str, Any]) -> None:
    wrong = list(info.get("mismatched_keys") or ())
    if wrong:
        key, found, expected = (*wrong[0], "?", "?")[:3] if isinstance(wrong[0], tuple) else (wrong[0], "?", "?")
        raise CorruptModelError(
            f"{source}: the config and the weights disagree on {len(wrong)} shapes; {key} is {_shape(found)} in the "
            f"file and "
            f"{_shape(expected)} by the config.",
            remedy="Use the config that belongs to the weights.",
        )
    absent = sorted(info.get("missing_keys") or ())
    if absent:
        raise CorruptModelError(
            f"{source}: {len(absent)} of the model's weights are not in the files, first {absent[0]}; they would be "
            f"random.",
            remedy="Use the config and the architecture that belong to the weights.",
        )
    extra = sorted(info.get("unexpected_keys") or ())
    layered = [key for key in extra if any(piece.isdigit() for piece in key.split("."))]
    if layered:
        raise CorruptModelError(
            f"{source}: {len(layered)} weights of blocks in the files have no place in the model, first {layered[0]}: "
            f"the config "
            "describes a smaller model.",
            remedy="Use the config that belongs to the weights.",
        )


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) if hasattr(shape, "__iter__") and not isinstance(shape, str) else str(shape)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _tokenizer(source: str, revision: str | None, local: bool) -> Any:
    import transformers

    if local and not any((Path(source) / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if local and (Path(source) / "tokenizer.json").is_file():
            raise CorruptModelError(
                f"The tokenizer of {source} could not be read: {_first_line(error)}", remedy="Copy it again."
            ) from error
        return None
    return tokenizer
