"""Whether a module can be called with what was given to `trace`, told before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from nnsight.core.history import add_note, user_place
from nnsight.errors import InputError


class Signature(NamedTuple):
    """What a forward takes, for the quick check: names in order, those that must be given, and what goes beyond."""

    names: tuple[str, ...]
    positional: int
    required: frozenset[str]
    keywords: bool


def check_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: Callable[[], str]) -> None:
    """Raises InputError where Python would raise TypeError in the middle of the block, or an input be ignored."""
    if not has_forward(module):
        inside = next(iter(module._modules), None)
        raise InputError(
            f"`{path()}` is a {type(module).__name__}, which has no forward and can't be run: the modules in it are "
            "called one by one.",
            you_wrote=user_place().source,
            instead=None if inside is None else f"model.get('{path()}.{inside}').trace(...)",
        )
    signature = signature_of(module)
    if signature is None:
        return
    names, n_positional, required, _ = signature
    if not kwargs and len(args) <= n_positional and required.issubset(names[: len(args)]):
        return
    missing = signature.required.difference(signature.names[: len(args)], kwargs)
    if missing and not args and not kwargs:
        raise _refused(path(), "was given nothing to run on", signature, f"with model.trace({_arguments(signature)}):")
    if len(args) > signature.positional:
        raise _refused(path(), f"was given {len(args)} positional inputs and takes {signature.positional}", signature)
    if missing:
        raise _refused(path(), f"needs `{'`, `'.join(sorted(missing))}` too", signature)
    if kwargs and not signature.keywords and (unknown := [name for name in kwargs if name not in signature.names]):
        near = difflib.get_close_matches(unknown[0], signature.names, n=1)
        raise _refused(path(), f"takes no `{unknown[0]}`", signature, f"`{near[0]}`" if near else None)


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: a list of modules can't."""
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in vars(module)


def check_no_text(root: nn.Module, args: tuple[Any, ...], path: Callable[[], str]) -> None:
    """Raises InputError for a prompt as text where a model of transformers, or a part of one, wants numbers."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, str) and hasattr(root, "main_input_name"):
        raise InputError(
            f"`{path()}` takes numbers here: text is read by the tokenizer of a whole language model.",
            you_wrote=user_place().source,
            instead="model.trace(text), of a LanguageModel; without a block, model.trace(text, trace=False)",
        )


def explain_call(error: Exception, module: nn.Module, given: int, label: str) -> None:
    """Adds a note where a block called a module without something that the model calls it with: rotary embeddings."""
    signature, text = signature_of(module), str(error)
    if signature is not None and given < len(signature.names) and ("NoneType" in text or "missing" in text):
        add_note(
            error,
            f"`{label}` was called here with {given} of the {len(signature.names)} inputs that its forward takes. What "
            "the model gives it is in `.inputs`: args, options = layer.inputs; layer(hidden, *args[1:], **options).",
        )


def signature_of(module: nn.Module) -> Signature | None:
    """What the module's forward takes; None where that can't be known."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    forward = module.forward
    return _signature(getattr(forward, "__func__", None) or getattr(type(module), "forward", forward))


@lru_cache(maxsize=512)
def _signature(forward: Callable[..., Any]) -> Signature | None:
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in parameters}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return Signature(
        tuple(p.name for p in named),
        sum(p.kind is not inspect.Parameter.KEYWORD_ONLY for p in named),
        frozenset(p.name for p in named if p.default is inspect.Parameter.empty),
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


def _arguments(signature: Signature) -> str:
    return ", ".join(name for name in signature.names if name in signature.required)


def _refused(path: str, what: str, signature: Signature, instead: str | None = None) -> InputError:
    takes = ", ".join(signature.names) or "nothing"
    return InputError(f"`{path}` {what}.", you_wrote=user_place().source, it_takes=takes, instead=instead)
