"""A config from a type's class with default arguments, made whole where the defaults alone can't be built.

Some defaults are no model: a field is None (`head_dim`) that every checkpoint sets and the code computes with, or the
class is a language model only with `is_decoder`. What is missing is found from the failure itself: the function that
failed names the fields that it reads, and those of them that are None are given a value of their meaning. No type is
named here.
"""

import inspect
import os
import re
import sys
from types import FrameType, TracebackType

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, configuration_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nnsight.anatomy.tiny.leaves import configs
from nnsight.anatomy.tiny.meaning import Meaning, meaning

MUST = re.compile(r"(\w+) must be (\w+), got")
LACKS = re.compile(r"'\w+' object has no attribute '(rope_theta)'")
WITHOUT = re.compile(r"'(\w+)' object has no attribute '(\w+)'")
SETS = re.compile(r"set (\w+)=(True|False) in the model's config")
WORDS = {"0": 0, "False": False, "True": True, "None": None}


def default_config(kind: str) -> PreTrainedConfig:
    """The config class with default arguments, and as a decoder where the class has the choice."""
    maker = CONFIG_MAPPING[kind]
    try:
        config = maker()
    except Exception as error:  # noqa: BLE001 - validators raise several kinds; what isn't understood is raised again
        config = _as_told(kind, maker, error)
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def _as_told(kind: str, maker: type[PreTrainedConfig], error: Exception, tries: int = 5) -> PreTrainedConfig:
    """Where the class refuses its own defaults and says "X must be Y", X of the text config is Y."""
    if "text_config" not in maker.sub_configs:
        own = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]).config_class
        if own is maker:
            raise error
        return own()  # MusicGen's was made of given parts only; its language model has a config of its own
    spec = maker.sub_configs_defaults["text_config"]
    text: dict[str, object] = {"model_type": spec.model_type or spec.config_class.model_type}
    while tries and (told := MUST.search(str(error))) and told[2] in WORDS:
        text[told[1]] = WORDS[told[2]]
        try:
            return maker(text_config=dict(text))
        except Exception as again:  # noqa: BLE001 - as above
            error, tries = again, tries - 1
    raise error


def complete(config: PreTrainedConfig, error: Exception) -> list[str]:
    """Give a value to the fields that the failing function read as None. Says which; none if the failure is another."""
    if lacks := LACKS.search(str(error)):
        for one in configs(config):
            if not hasattr(one, lacks[1]):
                setattr(one, lacks[1], 10_000.0)
        return [lacks[1]]
    if (lacks := WITHOUT.search(str(error))) and (flag := _flag_for(error, lacks[1], lacks[2])):
        setattr(config, flag, True)
        return [flag]
    if told := SETS.search(str(error)):
        setattr(config, told[1], WORDS[told[2]])
        return [told[1]]
    for kind in ("int", "list", "dict", "float"):
        for frame in _frames(error.__traceback__):
            filled = [name for name in _names(frame) for one in configs(config) if _fill(one, name, kind, frame)]
            if filled:
                return filled
    return []


def _flag_for(error: Exception, kind: str, name: str) -> str | None:
    """The flag of the config without which a module of this class doesn't make what it then reads, all the same."""
    owners = [frame.f_locals.get("self") for frame in _frames(error.__traceback__)]
    owner = next((type(one) for one in owners if type(one).__name__ == kind and isinstance(one, nn.Module)), None)
    if owner is None:
        return None
    under: list[tuple[int, str]] = []  # the flags that a line stands under, with the depth of each
    for line in inspect.getsource(owner.__init__).splitlines():
        depth = len(line) - len(line.lstrip())
        under = [one for one in under if one[0] < depth] if line.strip() else under
        if found := re.match(r"\s+if (?:self\.)?config\.(\w+):$", line):
            under.append((depth, found[1]))
        elif under and re.match(rf"\s+self\.{name}\b.* = ", line):
            return under[-1][1]
    return None


def _frames(trace: TracebackType | None) -> list[FrameType]:
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    # Code that was made at run time (a dataclass's) has no file to read.
    return [frame for frame in reversed(frames) if f"{os.sep}models{os.sep}" in frame.f_code.co_filename]


def _names(frame: FrameType) -> list[str]:
    """All that the failing function reads from something, and what its object's class does."""
    source = inspect.getsource(frame.f_code)
    if (owner := frame.f_locals.get("self")) is not None:
        source += inspect.getsource(type(owner))
    return sorted({name for pair in re.findall(r"\.(\w+)|\"(\w+)\"", source) for name in pair if name})


def _fill(config: PreTrainedConfig, name: str, kind: str, frame: FrameType) -> bool:
    fields = vars(config)
    name = config.attribute_map.get(name, name)
    if kind == "dict" and name == "rope_parameters" and isinstance(fields.get(name), dict):
        missing = [kind for kind in fields.get("layer_types") or [] if kind not in fields[name]]
        for kind in missing:
            fields[name][kind] = {"rope_type": "default", "rope_theta": 10_000.0}
        return bool(missing)
    # Configs are dataclasses, and were classes with a constructor before transformers 5.3 or so.
    hints = {**inspect.signature(type(config).__init__).parameters, **getattr(type(config), "__annotations__", {})}
    if meaning(name, 0) is Meaning.TOKEN:  # no special token is a choice, not a gap
        return False
    if name not in fields or fields[name] is not None or kind not in str(hints.get(name, "")):
        return False
    fields[name] = _layer_types(config, frame) if name == "layer_types" else _number(config, name)
    return fields[name] is not None


def _number(config: PreTrainedConfig, name: str) -> int:
    heads, hidden = getattr(config, "num_attention_heads", 1), getattr(config, "hidden_size", 64)
    if "kv" in name:  # an indexer's keys, which are one head's
        heads = 1
    dim = getattr(config, "head_dim", None) or hidden // heads
    of = {Meaning.DIM: dim, Meaning.HEADS: heads, Meaning.EXPERTS: 8, Meaning.EXPERT_GROUPS: 1, Meaning.CHOSEN: 1}
    return of.get(meaning(name, 0), 4)


def _layer_types(config: PreTrainedConfig, frame: FrameType) -> list[str] | None:
    """The layer types that the model's file speaks of, one after the other."""
    source = inspect.getsource(sys.modules[frame.f_globals["__name__"]])
    names = [name for name in vars(configuration_utils) if name.startswith("ALLOWED_") and "MLP" not in name]
    kinds = [kind for name in names for kind in getattr(configuration_utils, name) if f'"{kind}"' in source]
    kinds = list(dict.fromkeys(kinds + re.findall(r"layer\w*(?:\[\w+\])? [!=]= \"(\w+)\"", source)))
    return [kinds[index % len(kinds)] for index in range(config.num_hidden_layers)] if kinds else None
