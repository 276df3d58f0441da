"""Tiny random models of any architecture that transformers has: where the structure of a large one is found."""

from nnsight.anatomy.tiny.inputs import tiny_ids
from nnsight.anatomy.tiny.model import tiny_config, tiny_model

__all__ = ["tiny_config", "tiny_ids", "tiny_model"]
