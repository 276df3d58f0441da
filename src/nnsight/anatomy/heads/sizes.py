"""How many heads a layer of a large model has, and how wide they are, from what was seen of a tiny one.

The module that computes attention, and its config, have these numbers somewhere; the shapes of the weights must fit.
Those that stand under a name that has the tiny model's number in the tiny model are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from torch import nn

from nnsight.anatomy.heads.matrices import Projections, Sizes, stretch_of
from nnsight.anatomy.tiny.meaning import Meaning, meaning


def numbers_of(root: nn.Module, attention: nn.Module) -> dict[str, int]:
    """The whole numbers that an attention module has, and its config and the model's, by their names."""
    config: Any = root.config
    text = config.get_text_config(decoder=True)
    owners = {"": vars(attention)}
    for name, one in {**vars(attention), "(model)": config, "(text)": text}.items():
        if hasattr(one, "to_diff_dict"):
            owners[f"{name}."] = vars(one)
    found = {
        f"{owner}{name}": value
        for owner, fields in owners.items()
        for name, value in fields.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0
    }
    if (width := _width_of(text)) is not None:
        found["d_head"] = width
    return found


def _width_of(config: Any) -> int | None:
    try:
        return int(config.hidden_size // config.num_attention_heads)
    except Exception:  # noqa: BLE001  it has no such numbers, or refuses since they differ by layer
        return None


def sizes_in(numbers: Mapping[str, int], tiny: Projections, widths: Mapping[str, int]) -> Sizes | None:
    """The sizes of a layer's heads, the only ones that fit; None where several do, or none.

    Args:
        numbers: `numbers_of` the model itself.
        tiny: What was found in a tiny model.
        widths: How many outputs the matrix has that makes each of "q", "k", "v", and inputs that of "o".
    """
    fitting = {one for one in _tried(numbers, tiny, widths) if _fits(one, tiny, widths)}
    named = {one for one in fitting if one.heads in _counts(tiny.sizes.heads, numbers, tiny)}
    named = {one for one in named if one.kv_heads in _counts(tiny.sizes.kv_heads, numbers, tiny)} or named
    found = named or fitting
    return found.pop() if len(found) == 1 else None


def _counts(size: int, numbers: Mapping[str, int], tiny: Projections) -> set[int]:
    """The numbers that stand where the tiny model has this number of heads."""
    if size == 1:
        return {1}  # one head stays one
    return _named(size, Meaning.HEADS, numbers, tiny) or _named(size, None, numbers, tiny)


def _widths(size: int, numbers: Mapping[str, int], tiny: Projections, whole: int | None) -> set[int]:
    """The numbers that stand where the tiny model has this width of a head.

    Args:
        whole: The width of all heads together. A config that has no number for one head may have how many there are.
    """
    if found := _named(size, Meaning.DIM, numbers, tiny):
        return found
    shared = (
        set() if whole is None else {whole // many for many in _named(tiny.sizes.heads, Meaning.HEADS, numbers, tiny)}
    )
    return shared | _named(size, None, numbers, tiny)


def _named(size: int, what: Meaning | None, numbers: Mapping[str, int], tiny: Projections) -> set[int]:
    """Those that stand where the tiny model has this one, under a name that says what they count; None: under any."""
    names = [name for name, value in tiny.numbers.items() if value == size and name in numbers]
    return {numbers[name] for name in names if what is None or meaning(name, size) is what}


def _tried(numbers: Mapping[str, int], tiny: Projections, widths: Mapping[str, int]) -> Iterator[Sizes]:
    heads, kv_heads, d_head, d_value = tiny.sizes
    whole = widths.get("o")
    # Of latent attention, W_O alone is there.
    of_keys = _widths(d_head, numbers, tiny, whole) if {"q", "k"} & tiny.made.keys() else {d_head}
    of_values = _widths(d_value, numbers, tiny, whole) if {"v", "o"} & widths.keys() else {d_value}
    both = of_keys != {d_head} and of_values != {d_value}
    for wide, deep in product(of_keys, of_values):
        if both and (wide == deep) is not (d_head == d_value):
            continue
        own = {widths["o"] // deep} if "o" in widths else {widths["q"] // wide} if "q" in widths else set()
        for many in own | _counts(heads, numbers, tiny):
            few = {widths["k"] // wide} if "k" in widths else set()
            for one in {many} if heads == kv_heads else few | _counts(kv_heads, numbers, tiny):
                if one and not many % one and (many == one) is (heads == kv_heads):
                    yield Sizes(many, one, wide, deep)


def _fits(sizes: Sizes, tiny: Projections, widths: Mapping[str, int]) -> bool:
    if "o" in widths and widths["o"] != sizes.heads * sizes.d_value:
        return False
    made = {name: matrix for name, matrix in tiny.made.items() if name in widths}
    return all(stretch_of(matrix, name, sizes, widths[name]) is not None for name, matrix in made.items())
