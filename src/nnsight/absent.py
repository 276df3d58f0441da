"""What the existing package, or TransformerLens, has and this one doesn't: each has a line for an answer."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from nnsight.errors import InputError

REMOTE = "Models run in this process; there is no remote execution here."
_PYTHON = "A block is ordinary Python: write it as outside of one."
_NO_BACKEND = "A block runs where it stands, so there is no backend to choose."

_BUILTINS = ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")

NAMES = {
    "VLLM": "Models of vLLM can't be traced here.",
    "deprecated": "Nothing here is marked with it.",
    **{kind: f"Write {kind}(): a block is ordinary Python." for kind in _BUILTINS},
    "apply": "Call the function itself: a block is ordinary Python.",
    "cond": "Write if: a block is ordinary Python.",
    "log": "Write print(): a block is ordinary Python.",
    "local": REMOTE,
    "stop": "It is the trace that stops: tracer.stop()",
    "traceable": 'Any method can be traced: model.trace(x, fn="its name").',
    "applyn": _PYTHON,
    "fetch_attr": 'A dotted path is model.get("transformer.h.0").',
    "NNsightError": "What a model raises comes out as it is; this package's own errors are nnsight.Error.",
    "EarlyStopException": "tracer.stop() leaves its block by itself: there is nothing to catch.",
    "WithBlockNotFoundError": "A block runs where it stands: its source is not looked for.",
    **dict.fromkeys(("UnifiedTransformer", "Mamba"), "Any module can be wrapped: NNsight(model)."),
    **dict.fromkeys(("RemoteBackend", "AsyncRemoteBackend", "RemoteableMixin", "RequestModel"), REMOTE),
}
METHODS = {
    **dict.fromkeys(
        ("pipe", "pipeline"), "A pipeline is not a trace here: call model.generate(...), and decode what it returns."
    ),
    **dict.fromkeys(
        ("describe_checkpoint", "estimate_bytes", "from_model_key", "local", "max_tp_size", "to_model_key"), REMOTE
    ),
    **dict.fromkeys(("export_edits", "import_edits"), "A model edited by functions is kept with pickle."),
    **dict.fromkeys(("cond", "log"), _PYTHON),
    "exit": "It is the trace that stops: tracer.stop()",
    **{f"nns_{name}": f"It is .{name}; a child of that name is .E_{name}" for name in ("output", "input", "inputs")},
    **dict.fromkeys(("_path", "_module_path"), "It is .path"),
    "blocks": 'Layers are model.layers; names of TransformerLens are taken by model.site("blocks.3.hook_resid_post").',
    "run_with_cache": "with model.trace(prompt) as tracer:    cache = tracer.cache(...)",
    **dict.fromkeys(
        ("add_hook", "run_with_hooks"),
        "A block writes where it reads; with model.edit() as edited: for all later runs.",
    ),
    "reset_hooks": "Nothing stays on a model after a trace; model.clear_edits() takes its edits away.",
    **dict.fromkeys(("hook_dict", "hook_points"), "All places that have a value: print(model.sites())"),
    **dict.fromkeys(
        ("to_tokens", "to_string", "to_single_token", "tokenize", "encode", "decode", "tok"),
        "The tokenizer is model.tokenizer.",
    ),
    **dict.fromkeys(
        ("to_str_tokens", "tokens"),
        "A prompt's own are its row's: with model.trace([...]) as tracer, and tracer.rows[0].tokens",
    ),
    "cfg": "Sizes are model.n_layers, n_heads, d_model, d_head, d_mlp and n_vocab; the rest is in model.config.",
    "ln_final": "It is model.norm.",
    **{
        name: f"It is each layer's: model.layers[0].attn.{name}"
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
    },
    **{name: f"It is each layer's: model.layers[0].mlp.{name}" for name in ("W_in", "W_gate", "W_out")},
    **dict.fromkeys(("iter", "all"), "The steps of a generation are its trace's: for step in tracer.iter[:]"),
    "generator": "What a generation returns is tracer.result; step by step, it is for step in tracer.iter[:]",
    "backend": _NO_BACKEND,
    **{
        name: f"That is of its trace: with model.trace(...) as tracer, and then tracer.{name}"
        for name in ("invoke", "barrier", "rows", "cache", "stop", "result")
    },
}
OPTIONS = {
    "remote": REMOTE,
    "blocking": REMOTE,
    "job_id": REMOTE,
    "verbose": REMOTE,
    "backend": _NO_BACKEND,
    "tracer_cls": "The kind of tracer is the model's own.",
    "scan": "A block is checked as it runs; model.scan(...) has its shapes without weights.",
    "validate": "A block is checked as it runs.",
    "invoker_args": "What it would hold is given to the trace itself: truncation=True, max_length=...",
}
# What these ask for happens anyway: a program goes on with them.
CHECKS = ("scan", "validate")
SESSION = {
    **dict.fromkeys(("apply", "cond", "exit", "iter", "list", "log"), _PYTHON),
    "backend": _NO_BACKEND,
}
SETTINGS = {
    "save": "It lasts as long as the process, and is written nowhere.",
}
SECTIONS = {
    "API": dict.fromkeys(("APIKEY", "COMPRESS", "HOST", "SSL"), REMOTE),
    "APP": {
        "CACHE_DIR": "Nothing is kept in files.",
        "CROSS_INVOKER": "Invokes always find each other's names.",
        "DEBUG": "Errors are raised at your line as it is.",
        "DISABLE_CPP_BACKTRACE": "Nothing of libc is changed; see nnsight.CONFIG.switch.",
        "PYMOUNT": "`.save()` is there for tensors and builtin containers from the first trace on; nothing needs it.",
        "REMOTE_LOGGING": REMOTE,
        "TRACE_CACHING": "A block's source is not read.",
    },
}


def no_such_name(module: str, name: str, *, imported: bool) -> AttributeError | ImportError:
    """For a module's `__getattr__`: why it doesn't have a name that the existing package has there.

    Args:
        imported: Whether it is asked for by `from module import name`, which replaces the text of an AttributeError.
    """
    why = NAMES.get(name)
    text = f"module {module!r} has no attribute {name!r}" + (f". {why}" if why else "")
    return ImportError(text, name=module) if why and imported else AttributeError(text)


class Section:
    """`nnsight.CONFIG.API` and `nnsight.CONFIG.APP`: programs set what is in them, and it means nothing here.

    What is switched off asks for nothing. Of anything else, a warning says so, and the program goes on.
    """

    def __init__(self, name: str) -> None:
        vars(self)["_name"] = name

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in SECTIONS[self._name]:
            self.__getattr__(name)
        if value:
            means_nothing(f"nnsight.CONFIG.{self._name}.{name}", SECTIONS[self._name][name])
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        why = SECTIONS[self._name].get(name, f"It has {', '.join(sorted(SECTIONS[self._name]))}, and no use for them.")
        raise AttributeError(f"nnsight.CONFIG.{self._name} has no `{name}`. {why}")

    def __repr__(self) -> str:
        return f"<nnsight.CONFIG.{self._name}: settings that mean nothing here>"


def means_nothing(what: str, why: str) -> None:
    """Warns of something that a program sets and that has no effect, at the line outside of this package."""
    warnings.warn(f"`{what}` means nothing here. {why}", UserWarning, stacklevel=3)


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raises InputError for a keyword that means nothing here, but for those of the existing package, switched off."""
    for name, value in given.items():
        if name not in OPTIONS or value:
            why = OPTIONS.get(name, "There is no such option.")
            raise InputError(f"`{name}` has no meaning here. {why}", you_gave=f"{name}={value!r}")


def without_options(kwargs: dict[str, Any], takes: Collection[str]) -> dict[str, Any]:
    """A call's keywords without those that are switched off (`remote=False`) and so ask for nothing.

    Args:
        takes: Names that are the model's own.

    Raises:
        InputError: One of them is not switched off.
    """
    given = {name: kwargs[name] for name in OPTIONS if name in kwargs and name not in takes}
    refuse_options(given)
    return {name: value for name, value in kwargs.items() if name not in given}
