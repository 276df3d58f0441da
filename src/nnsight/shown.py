"""The module tree as torch prints it, with further names in front of the modules' own: `(ff/mlp): GPT2MLP(`.

And with a line for each value that a class of `envoys=` describes: `(heads): [batch, token, head, width]`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nnsight.core.catalogue import ROOT, Names

Described = Mapping[nn.Module, Mapping[str, str]]


def shown(module: nn.Module, path: str, aliases: Names, described: Described) -> str:
    """A module and all below it, as text.

    Args:
        module: What is printed, with all below it.
        path: Where it stands; the root is "model".
        aliases: For each path, further names below it and the paths they lead to.
        described: For each module that has some, its values and what they are.
    """
    renamed = any(owner == path or owner.startswith(f"{path}.") for owner in aliases)
    if not renamed and (not described or described.keys().isdisjoint(module.modules())):
        return repr(module)
    own = aliases.get(path, {})
    lines = [line for line in module.extra_repr().split("\n") if line]
    for name, child in module._modules.items():
        below = f"{path}.{name}"
        names = "/".join([*(alias for alias, target in own.items() if target == below), name])
        text = repr(None) if child is None else shown(child, below, aliases, described)
        lines.append(f"({names}): " + text.replace("\n", "\n  "))
    children = {f"{path}.{name}" for name in module._modules}
    lines += [
        f"({alias}): {target.removeprefix(ROOT + '.')}" for alias, target in own.items() if target not in children
    ]
    lines += [f"({name}): {what}" for name, what in described.get(module, {}).items()]
    inner = "".join(f"\n  {line}" for line in _folded(lines))
    return f"{module._get_name()}({inner}\n)"


def _folded(lines: list[str]) -> list[str]:
    """Numbered children in a row that print alike, as one: `(0-11): 12 x GPT2Block(`."""
    folded: list[tuple[int, int, str]] = []
    kept: list[str | int] = []
    for line in lines:
        head, _, text = line.partition("): ")
        number = head[1:]
        if not number.isdigit() or not line.startswith("("):
            kept.append(line)
        elif kept and isinstance(kept[-1], int) and folded[-1][2] == text and folded[-1][1] == int(number) - 1:
            folded[-1] = (folded[-1][0], int(number), text)
        else:
            folded.append((int(number), int(number), text))
            kept.append(len(folded) - 1)
    return [_numbered(*folded[one]) if isinstance(one, int) else one for one in kept]


def _numbered(first: int, last: int, text: str) -> str:
    return f"({first}): {text}" if first == last else f"({first}-{last}): {last - first + 1} x {text}"
