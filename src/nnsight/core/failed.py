"""What is told with an error of the model's own: the writes that may be to blame, a traceback without our frames."""

from __future__ import annotations

from pathlib import Path
from types import CodeType, TracebackType

from torch import nn

from nnsight.core.history import PACKAGE, Access
from nnsight.core.specs import show_both, show_shape
from nnsight.core.tree import Tree
from nnsight.errors import Error


def blame(tree: Tree, writes: list[Access], who: str = "the block") -> str | None:
    """A note for an error of torch's that names what was skipped, and writes that changed a shape, dtype or device."""
    lines = []
    for access in writes:
        if access.verb == "skipped":
            name = tree.label(access.module)
            lines.append(f"{access.place.quoted}\n    skipped `{name}`, for which it gave {show_shape(access.shape)}")
        elif access.was is not None and access.shape != access.was:
            shape, was = show_both(access.shape, access.was)
            what = f"{access.verb} `{tree.name_of(access.module, access.kind)}`"
            lines.append(f"{access.place.quoted}\n    {what} with {shape}, where the model had {was}")
    return "\n".join([f"Before that, {who} changed what the model works on:", *lines]) if lines else None


def without_weights(module: nn.Module, error: BaseException) -> str | None:
    """A note for an error of torch's that a model made on `meta` raises when it is given values."""
    weights = list(module.parameters())
    if not weights or "meta" not in str(error) or not all(one.is_meta for one in weights):
        return None
    if any(hasattr(one, "_hf_hook") for one in module.modules()):  # accelerate brings them in, call by call
        return None
    return (
        "The weights of this model are on `meta`: they have shapes and no values. Its inputs belong there too, "
        'x.to("meta"), in a trace as in a scan; or model.to_empty(device="cpu"), and weights to load.'
    )


def without_our_frames(error: BaseException | None, raised_by: CodeType) -> None:
    """Takes the library's own frames out of a traceback, behind the user's line; that of a bug of its own keeps them.

    An error of ours, whose text says what there is to say, ends at that line. Behind what the model raised, only those
    are left out that led to the model; `raised_by` is the last of them.
    """
    if error is None:
        return
    traceback, users = error.__traceback__, None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code is raised_by and traceback.tb_next is not None:
            if users is not None:
                users.tb_next = traceback.tb_next
                return
            error.__traceback__ = traceback.tb_next  # at the end of the block, whose line comes in front
        if not code.co_filename.startswith(PACKAGE):
            users = traceback
        traceback = traceback.tb_next
    if users is not None and isinstance(error, Error):
        users.tb_next = None


def without_plumbing(traceback: TracebackType | None) -> TracebackType | None:
    """A model's traceback without our frames and those of `Module.__call__`, three for each module it passes."""
    frames: list[TracebackType] = []
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    kept = [frame for frame in frames if frame.tb_frame.f_code.co_filename not in _PLUMBING] or frames[-1:]
    for frame, following in zip(kept, [*kept[1:], None], strict=False):
        frame.tb_next = following
    return kept[0] if kept else None


_CORE = ("execution.py", "run.py", "hooks.py", "ports.py", "standin.py", "counter.py", "operations.py")
_ANATOMY = ("interior.py", "interface.py", "direct.py")
_PLUMBING = {
    nn.Module._call_impl.__code__.co_filename,
    *(str(Path(PACKAGE, "core", ours)) for ours in _CORE),
    *(str(Path(PACKAGE, "anatomy", ours)) for ours in _ANATOMY),
}
