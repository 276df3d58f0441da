"""Quantised models: the short names for what weights become, and the packages that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from nnsight.errors import InputError
from nnsight.models.packages import check_installed

# What `dtype=` may be beside torch's types. The names of the existing package, with its compute dtypes.
_FOUR_BITS = {"nf4": "nf4", "4bit": "nf4", "int4": "nf4", "fp4": "fp4"}
_EIGHT_BITS = frozenset({"int8", "8bit"})
NAMES = frozenset({*_FOUR_BITS, *_EIGHT_BITS, "fp8"})
_COMPUTE = ("compute_dtype", "bnb_4bit_compute_dtype")
_PACKAGES = ("bitsandbytes", "torchao")  # whose methods are called so


def resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for loading in which `dtype="nf4"` and its like have become a `quantization_config`.

    Raises:
        InputError: Both were given, a compute dtype without either, or this machine can't compute with it.
        MissingPackageError: The package for it isn't there.
    """
    rest = {name: value for name, value in options.items() if name not in _COMPUTE}
    asked = [name for name in _COMPUTE if options.get(name) is not None]
    name = options.get("dtype")
    if not (isinstance(name, str) and name in NAMES):
        if asked:
            raise InputError(
                f"`{asked[0]}` is for weights that are quantised by name.",
                you_gave=f"{asked[0]}={options[asked[0]]!r}",
                instead='dtype="nf4" beside it, or it in the quantization_config',
            )
        return rest
    if options.get("quantization_config") is not None:
        raise InputError(
            f"`dtype={name!r}` is a quantisation, and so is the `quantization_config`.", instead="one of the two"
        )
    given = options[asked[0]] if asked else torch.float16 if name in _EIGHT_BITS else torch.bfloat16
    compute = _dtype(given)
    return {**rest, "dtype": compute, "quantization_config": _config(name, compute)}


def _dtype(given: Any) -> torch.dtype:
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(
            f"{given!r} is no type to compute with.", instead="torch.bfloat16, torch.float16, torch.float32"
        )
    return found


def _config(name: str, compute: torch.dtype) -> Any:
    if name == "fp8":
        _check_fp8()
        return transformers.FineGrainedFP8Config()
    check_installed("bitsandbytes", f"`dtype={name!r}`", "quantization")
    if name in _EIGHT_BITS:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=_FOUR_BITS[name], bnb_4bit_compute_dtype=compute
    )


def _check_fp8() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise InputError(
            'Weights of 8-bit floats (`dtype="fp8"`) need a GPU of compute capability 8.9 or more.',
            instead='dtype="nf4", or dtype="int8"',
        )


def check_configured(config: Any, options: Mapping[str, Any]) -> None:
    """Raises MissingPackageError now, rather than with the first run, for what the weights will need.

    Args:
        config: The model's; its own `quantization_config` is that of weights which are stored quantised.
        options: Of loading.
    """
    for one in (options.get("quantization_config"), getattr(config, "quantization_config", None)):
        method = one.get("quant_method") if isinstance(one, Mapping) else getattr(one, "quant_method", None)
        method = getattr(method, "value", method)
        if method in _PACKAGES:
            what = "This model" if isinstance(one, Mapping) else f"A {type(one).__name__}"
            check_installed(method, what, "quantization")
