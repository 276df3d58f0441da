"""What law 1 compares: everything of a module tree, and everything of the process, that a trace could have changed."""

import builtins
import gc
import signal
import sys
import threading
import warnings

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _len_torch_dispatch_stack

MOUNTED = (torch.Tensor, list, dict, tuple, set, int, float, bool, str)


def all_modules(module):
    """Every module below `module`, those in plain lists too."""
    found, todo = {}, [module]
    while todo:
        one = todo.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        for value in vars(one).values():
            parts = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            todo.extend(part for part in parts if isinstance(part, nn.Module))
    return list(found.values())


def of_model(module):
    """The tree by identity: attributes, hook dicts with their keys in order, forward, parameters, buffers."""
    seen = []
    for one in all_modules(module):
        entry = {"class": type(one), "attributes": {name: id(value) for name, value in vars(one).items()}}
        entry["names"] = list(vars(one))
        entry["forward"] = one.forward.__func__ if hasattr(one.forward, "__func__") else one.forward
        entry["training"] = one.training
        for name, value in vars(one).items():
            if isinstance(value, dict):
                entry[name] = [(key, id(part)) for key, part in value.items()]
        for name, tensor in [*one.named_parameters(recurse=False), *one.named_buffers(recurse=False)]:
            entry["tensor " + name] = (
                id(tensor),
                tensor.data_ptr(),
                tensor.requires_grad,
                tensor._version,
                tensor.grad is None,
            )
            entry["hooks " + name] = tensor._backward_hooks
        seen.append((id(one), entry))
    return seen


def contents(namespace):
    return {name: id(value) for name, value in namespace.items()}


def of_process():
    """The process: what torch, builtins, sys, threading and the interpreter's modes hold."""
    state = {
        "torch": contents(vars(torch)),
        "Module": contents(vars(nn.Module)),
        "torch.nn": contents(vars(nn)),
        "functional": contents(vars(nn.functional)),
        "autograd": contents(vars(torch.autograd)),
        "builtins": contents(vars(builtins)),
        "trace": sys.gettrace(),
        "profile": sys.getprofile(),
        "excepthook": sys.excepthook,
        "displayhook": sys.displayhook,
        "breakpointhook": sys.breakpointhook,
        "unraisablehook": sys.unraisablehook,
        "threading.excepthook": threading.excepthook,
        "streams": (id(sys.stdout), id(sys.stderr), id(sys.stdin)),
        "threads": {thread.ident for thread in threading.enumerate()},
        "warnings": [filter[:3] for filter in warnings.filters],
        "showwarning": warnings.showwarning,
        "signals": signal.getsignal(signal.SIGINT),
        "path": list(sys.path),
        "path_hooks": len(sys.path_hooks),
        "meta_path": len(sys.meta_path),
        "recursion": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "gc": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "async": sys.get_asyncgen_hooks(),
        "global hooks": [
            len(getattr(torch_module, name))
            for name in dir(torch_module)
            if name.startswith("_global") and isinstance(getattr(torch_module, name), dict)
        ],
        "stance": stance(),
    }
    for kind in MOUNTED:
        state[kind.__name__] = {name: id(value) for name, value in vars(kind).items() if name != "save"}
    return state | of_modes()


def stance():
    """`torch.compiler.set_stance`'s state, where `torch._dynamo` has been imported (nothing sets it otherwise)."""
    frame = sys.modules.get("torch._dynamo.eval_frame")
    return getattr(getattr(frame, "_stance", None), "stance", "default")


def of_modes():
    """What torch keeps per thread."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dispatch": _len_torch_dispatch_stack(),
        "function": torch._C._len_torch_function_stack(),
        "function enabled": torch._C._is_torch_function_enabled(),
        "default device": str(torch.get_default_device()),
        "default dtype": torch.get_default_dtype(),
        "anomaly": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "saved": torch._C._autograd._top_saved_tensors_default_hooks(False),
        "functorch": torch._C._functorch.maybe_current_level(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "multithreading": torch._C._is_multithreading_enabled(),
    } | of_accelerator()


def of_accelerator():
    """The same on an accelerator that is in use: its autocast, its current device, and the current stream of each."""
    device = torch.accelerator.current_accelerator()
    if device is None or not getattr(torch.get_device_module(device), "_initialized", False):
        return {}
    return {
        "accelerator's autocast": torch.is_autocast_enabled(device.type),
        "accelerator's autocast dtype": torch.get_autocast_dtype(device.type),
        "device": torch.accelerator.current_device_index(),
        "streams": [torch.accelerator.current_stream(i) for i in range(torch.accelerator.device_count())],
    }


def differences(before, after):
    """The entries that differ, in words."""
    if isinstance(before, list):
        return [
            f"{i}: {difference}"
            for i, (a, b) in enumerate(zip(before, after, strict=True))
            if a != b
            for difference in differences(a[1], b[1])
        ]
    found = []
    for key in before.keys() | after.keys():
        one, other = before.get(key), after.get(key)
        if one != other:
            if isinstance(one, dict) and isinstance(other, dict):
                changed = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
                one, other = f"{changed} before", "after"
            found.append(f"{key}: {one!r} / {other!r}")
    return found
