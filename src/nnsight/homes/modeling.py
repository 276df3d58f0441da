"""Where programs written for the existing package look for names that are in nnsight itself: `LanguageModel`."""

from nnsight.homes import old_home

__getattr__ = old_home(
    __name__,
    "base",
    "diffusion",
    "huggingface",
    "language",
    "mixins",
    "mixins.remoteable",
    "transformers",
    "vllm",
    "vlm",
)
