"""`LanguageModel`: models that predict tokens."""

from __future__ import annotations

from nnsight.models import tasks
from nnsight.models.transformers_model import TransformersModel


class LanguageModel(TransformersModel):
    """A model that predicts tokens, with its tokenizer, and with one set of names for what all such models have.

    Args and attributes are those of `TransformersModel`: most often a name or folder alone, or a module that is loaded
    already and its `tokenizer=`. The weights come with the first run, or with `dispatch=True`.

    The head is the one that the config names: of the next token, of an answer to a prompt (T5, BART), of tokens that
    are hidden (BERT), of what was said (Whisper). A family without such a name has the first of these that there is.

    Raises:
        HubError: The model isn't in reach.
        ModelError: It isn't a model that predicts tokens, or options for loading came with a loaded module.
        InputError: An option that nobody has a use for.

    Example:
        >>> from nnsight import LanguageModel
        >>> model = LanguageModel("nnsight/demo")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     hidden = model.layers[5].output
        ...     answer = model.logits[0, -1].argmax()
        >>> hidden.shape, model.tokenizer.decode(answer)
        (torch.Size([1, 12, 128]), ' Paris')
    """

    _TASKS: tuple[str, ...] = tasks.SAY_TOKENS
