"""Questions that are often put to a model, each in one call; the arithmetic stands apart, as functions of arrays."""

from .lens import Lens, logit_lens, top_predictions

__all__ = ["Lens", "logit_lens", "top_predictions"]
