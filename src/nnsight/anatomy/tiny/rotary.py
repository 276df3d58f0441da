"""What a config lists by pairs of rotary dims, cut to the fewer pairs of a small head."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

__all__ = ["fit_rotary"]


def fit_rotary(config: PreTrainedConfig, dims: dict[int, int], shares: list[float]) -> None:
    """Fit LongRoPE's factors, one a pair, and the sections of a multimodal embedding, which add up to the pairs.

    Args:
        config: Its `rope_parameters` (or `rope_scaling`) are replaced.
        dims: What became of the dims of a head.
        shares: The parts of a head that are turned.
    """
    pairs = {int(dim * share) // 2: int(small * share) // 2 for share in [1.0, *shares] for dim, small in dims.items()}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(vars(config).get(name), dict):
            vars(config)[name] = _fitted(vars(config)[name], pairs)


def _fitted(value: Any, pairs: dict[int, int]) -> Any:
    if isinstance(value, dict):
        return {key: _fitted(item, pairs) for key, item in value.items()}
    if not isinstance(value, list) or not value or isinstance(value[0], str):
        return value
    if len(value) in pairs:
        few = pairs[len(value)]
        return [value[index * len(value) // few] for index in range(few)]
    if sum(value) in pairs:
        few, total = pairs[sum(value)], sum(value)
        # Sections may become empty, not negative: each ends where its share of the pairs ends.
        ends = [round(sum(value[: index + 1]) * few / total) for index in range(len(value))]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return value
