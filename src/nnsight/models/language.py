"""Language models."""

from __future__ import annotations

from nnsight.models import tasks
from nnsight.models.transformers_model import TransformersModel


class LanguageModel(TransformersModel):
    """A model that predicts tokens, with its tokenizer, and with one set of names for what all such models have.

    Args and attributes are those of `TransformersModel`. The head is the one that the config names: of the next token,
    of an answer to a prompt (T5, BART), of tokens that are hidden (BERT), of what was said (Whisper). A family without
    such a name has the first of these that there is.

    Raises:
        HubError: The model isn't in reach.
        ModelError: It isn't a model that predicts tokens, or options for loading came with a loaded module.
        InputError: An option that nobody has a use for.
    """

    _TASKS: tuple[str, ...] = tasks.SAY_TOKENS
