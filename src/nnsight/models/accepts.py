"""What one model can be given, read once from the model itself, and the names of everything it can't.

Nothing here runs the model or needs its weights: a model on `meta` answers the same.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

from nnsight.core.history import user_place
from nnsight.core.spelling import nearest
from nnsight.errors import InputError

# Options of the tokenizer's that change the ids; what else a tokenizer can do has no place in a prompt.
TEXT_OPTIONS = frozenset(
    {"add_special_tokens", "truncation", "max_length", "padding", "padding_side", "split_special_tokens"}
)
CHAT_OPTIONS = frozenset({"add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template"})
OPTIONS = TEXT_OPTIONS | CHAT_OPTIONS | {"return_tensors"}

_ONE_LABEL = ("Classification", "Prediction", "Choice")  # a prompt, not a token

# What a forward that ends in `**kwargs` understands beside its own names. `position_ids` is in transformers' list of
# them too, but a model without learned or rotary positions swallows it.
_OUTPUT_SWITCHES = frozenset({"output_attentions", "output_hidden_states", "return_dict", "use_cache"})


@dataclass(frozen=True)
class Accepts:
    """What a model's forward takes.

    Args:
        model: The class, for messages.
        names: The keywords that it understands.
        anything: Its `**kwargs` go to code that isn't transformers', so that no keyword can be called unknown.
        holder: The module below which the embedding hangs, as `slot`; None where ids are looked up in no table.
        slot: Its name there.
        positions: How many tokens fit, where learned positions limit it; else None.
        wants_positions: It takes `position_ids`, and would count the padding where it isn't given them.
        first_position: Which one a prompt's first token has, where none are given; not 0 in PaliGemma.
        side: Where padding goes; left for a model that predicts the next token, but for those that would count it.
        pad: The id that fills up short rows; inside the vocabulary, hidden by the mask.
        no_tokenizer: Why there is no tokenizer, where there is none.
        main: The input that a run starts from; ids, but for images and sound.
        translates: It reads with an encoder, and answers with a decoder of its own.
        must_begin: What its decoder begins with has to be given to a forward pass.
        labels: What the labels count: the prompt's tokens, tokens of their own, or prompts.
        chooses: It reads several choices for each prompt, [prompt, choice, token].
    """

    model: str
    names: frozenset[str]
    anything: bool
    holder: nn.Module | None
    slot: str
    positions: int | None
    wants_positions: bool
    first_position: int
    side: Literal["left", "right"]
    pad: int
    no_tokenizer: str
    main: str
    translates: bool
    must_begin: bool
    labels: Literal["tokens", "own tokens", "prompts"]
    chooses: bool

    @property
    def embedding(self) -> nn.Embedding | None:
        """The table of the ids, as it is now: a vocabulary can be resized."""
        found = None if self.holder is None else self.holder._modules.get(self.slot)
        return found if isinstance(found, nn.Embedding) else None


def accepts(module: nn.Module, tokenizer: Any = None, no_tokenizer: str = "") -> Accepts:
    """Reads from a transformers module, loaded or on `meta`, what it can be given."""
    names, anything = _keywords(type(module).forward, type(module).__module__)
    embedding = _embedding(module)
    holder, slot = _place(module, embedding)
    learned = _learned_positions(module, embedding)
    own_count = None if learned is None else learned.padding_idx  # RoBERTa counts what isn't this id
    translates = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
    left = not translates and _predicts_next(module) and (own_count is not None or not _counts_padding(module, names))
    return Accepts(
        model=type(module).__name__,
        names=names,
        anything=anything,
        holder=holder,
        slot=slot,
        positions=None if learned is None else _room(learned),
        wants_positions="position_ids" in names and own_count is None,
        first_position=int(getattr(getattr(module, "config", None), "model_type", "") == "paligemma"),
        side="left" if left else "right",
        pad=_pad_id(module, tokenizer, embedding) if own_count is None else own_count,
        no_tokenizer=no_tokenizer,
        main=getattr(module, "main_input_name", "input_ids"),
        translates=translates,
        must_begin=translates and "decoder_input_ids" in names and not _begins_itself(module),
        chooses=type(module).__name__.endswith("ForMultipleChoice"),
        labels="own tokens" if translates else "prompts" if type(module).__name__.endswith(_ONE_LABEL) else "tokens",
    )


def _begins_itself(module: nn.Module) -> bool:
    """Whether its decoder, given nothing, reads the prompt shifted by one, as BART's does."""
    own: Any = type(module)
    base: Any = type(getattr(module, "base_model", module))
    if "_shift_right" in inspect.unwrap(own.forward).__code__.co_names and not own.can_generate():
        return True  # T5's classifiers
    return "shift_tokens_right" in inspect.unwrap(base.forward).__code__.co_names


def _pad_id(module: nn.Module, tokenizer: Any, embedding: nn.Embedding | None) -> int:
    """The tokenizer's pad id, else its end of text, else the config's; the first that the embedding has a row for."""
    vocabulary = None if embedding is None else embedding.num_embeddings
    config = getattr(module, "config", None)
    for holder in (tokenizer, config):
        for name in ("pad_token_id", "eos_token_id"):
            value = _first(getattr(holder, name, None))
            if isinstance(value, int) and 0 <= value < (vocabulary or value + 1):
                return value
    return 0


def _first(value: Any) -> Any:
    """A config may list several ends of text."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


@cache
def _keywords(forward: Callable[..., Any], home: str) -> tuple[frozenset[str], bool]:
    """The names that a forward understands, and whether it may understand more than can be listed."""
    parameters = inspect.signature(forward).parameters.values()
    named = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)) - {"self"}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return named, False
    return named | _shared_keywords(), not home.startswith("transformers.")


@cache
def _shared_keywords() -> frozenset[str]:
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils.generic import TransformersKwargs

    listed = frozenset(TransformersKwargs.__annotations__) | frozenset(FlashAttentionKwargs.__annotations__)
    return (listed | _OUTPUT_SWITCHES) - {"position_ids"}


def _embedding(module: nn.Module) -> nn.Embedding | None:
    """The table that ids are looked up in; None for a module that isn't a language model."""
    try:
        found = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _place(module: nn.Module, embedding: nn.Embedding | None) -> tuple[nn.Module | None, str]:
    """Where the embedding hangs: looking there is quick, and `get_input_embeddings` is not."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None and child is embedding:
                return parent, name
    return None, ""


def _learned_positions(module: nn.Module, embedding: nn.Embedding | None) -> nn.Embedding | None:
    """The table of learned positions: an embedding of exactly the config's positions that isn't the tokens'."""
    limit = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    tables = (m for m in module.modules() if isinstance(m, nn.Embedding) and m is not embedding)
    return next((t for t in tables if t.num_embeddings - _offset(t) == limit), None)


def _offset(table: nn.Embedding) -> int:
    """Rows in front of position 0 that the config doesn't count: OPT keeps two."""
    offset = getattr(table, "offset", 0)
    return offset if isinstance(offset, int) else 0


def _room(table: nn.Embedding) -> int:
    """Tokens that fit: RoBERTa starts counting behind its padding row."""
    reserved = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - _offset(table) - reserved


def _predicts_next(module: nn.Module) -> bool:
    can_generate = getattr(module, "can_generate", None)
    if can_generate is not None and can_generate():
        return True
    return any(getattr(m, "is_causal", False) is True for m in module.modules())


_SEE_PADDING = frozenset({"rwkv", "recurrent_gemma"})


def _counts_padding(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether padding in front changes a prompt's numbers: BART's kind can't be told positions, others have no mask.

    RWKV takes a mask and ignores it; Recurrent Gemma's convolution works through what it hides.
    """
    if "attention_mask" not in names or getattr(getattr(module, "config", None), "model_type", None) in _SEE_PADDING:
        return True
    return "position_ids" not in names and any(name.endswith("embed_positions") for name, _ in module.named_modules())


def check_names(given: Iterable[str], takes: Accepts) -> None:
    """Raises InputError for the first keyword that neither the forward nor the tokenizer has a use for."""
    for name in given:
        if name in takes.names or takes.anything:
            continue
        if name in _generation_names():
            raise _needs_generate(name)
        raise InputError(
            f"`{name}` is no input of {takes.model}, and no option of its tokenizer.",
            you_gave=f"{name}=...",
            nearest=nearest(name, sorted(takes.names | OPTIONS)),
            write="the prompt by its position: model.trace(prompt)" if name in _PROMPT else None,
        )


def check_generation_names(given: Mapping[str, Any], module: nn.Module, takes: Accepts) -> None:
    """Raises InputError for a misspelt option of `generate`, which transformers would find when the model runs."""
    listed = _generation_names()
    unknown = [name for name, value in given.items() if value is not None and name not in takes.names | listed]
    if not unknown or takes.anything:
        return
    own: Any = type(module)
    methods = [own.generate, getattr(own, "prepare_inputs_for_generation", own.generate)]
    if not all(map(_is_of_transformers, methods)):
        return
    taken = {name for method in methods for name in inspect.signature(method).parameters}
    for name in unknown:
        other = _ELSEWHERE.get(name)
        near = [other] if other else difflib.get_close_matches(name, sorted(listed), n=2, cutoff=0.85)
        if near and name not in taken:
            raise InputError(
                f"`{name}` is no option of generation, and no input of {takes.model}.",
                you_gave=f"{name}=...",
                nearest=", ".join(f"`{other}`" for other in near),
            )


# What others call options of generation: vLLM, TransformerLens, the services.
_ELSEWHERE = {
    **dict.fromkeys(("max_tokens", "n_tokens", "num_tokens", "n_new_tokens"), "max_new_tokens"),
    **dict.fromkeys(("beams", "beam_size", "n_beams"), "num_beams"),
    **dict.fromkeys(("n", "num_samples", "n_samples"), "num_return_sequences"),
    **dict.fromkeys(("stop", "stop_sequences"), "stop_strings"),
    "temp": "temperature",
}


def _is_of_transformers(method: Any) -> bool:
    return str(method.__module__).startswith("transformers.")


_PROMPT = frozenset({"prompt", "prompts", "text", "texts", "sentence", "sentences"})


def _needs_generate(name: str) -> InputError:
    return InputError(
        f"`{name}` is an option of generation, and this is one forward pass.",
        you_wrote=user_place().source,
        write=f"model.generate(..., {name}=...)",
    )


@cache
def _generation_names() -> frozenset[str]:
    from transformers import GenerationConfig, GenerationMixin

    named = inspect.signature(GenerationMixin.generate).parameters
    return frozenset(vars(GenerationConfig())) | (frozenset(named) - {"self", "kwargs"})


def check_ids(ids: Tensor, takes: Accepts) -> None:
    """Raises InputError for an id without a row in the embedding, where looking costs no wait for an accelerator."""
    embedding = takes.embedding
    if embedding is None or ids.device.type != "cpu":
        return
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= embedding.num_embeddings:
        wrong, last = low if low < 0 else high, embedding.num_embeddings - 1
        raise InputError(
            f"{wrong} is not a token of {takes.model}: its ids are 0 to {last}.",
            usual_cause="the tokenizer belongs to another model",
        )


def check_length(length: int, takes: Accepts, fields: Mapping[str, Any]) -> None:
    """Raises InputError for a prompt with more tokens than the model has learned positions."""
    if takes.positions is None or length <= takes.positions or "position_ids" in fields:
        return
    raise InputError(
        f"The prompt has {length} tokens, and {takes.model} has positions for {takes.positions}.",
        write=f"truncation=True, max_length={takes.positions}",
    )
