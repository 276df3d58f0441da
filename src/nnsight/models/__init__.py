"""Models that come with more than a module: everything here may import transformers, nothing below here does.

In its early versions, the existing package has `LanguageModel` here.
"""

from nnsight.homes import old_home

__getattr__ = old_home(__name__, "LanguageModel", "Mamba", "NNsightModel", "UnifiedTransformer", "mixins")
