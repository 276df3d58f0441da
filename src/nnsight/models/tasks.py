"""Which of transformers' classes a model is loaded with: from its task, else from what its config says of itself."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PreTrainedConfig

from nnsight.errors import ModelError

NEXT_TOKEN = "text-generation"
READ_IMAGES = "image-text-to-text"

# In the order in which they are looked through for a class that several have.
CLASSES: dict[str, Any] = {
    NEXT_TOKEN: ("AutoModelForCausalLM",),
    "text2text-generation": ("AutoModelForSeq2SeqLM",),
    "summarization": ("AutoModelForSeq2SeqLM",),
    "translation": ("AutoModelForSeq2SeqLM",),
    "fill-mask": ("AutoModelForMaskedLM",),
    "text-classification": ("AutoModelForSequenceClassification",),
    "zero-shot-classification": ("AutoModelForSequenceClassification",),
    "token-classification": ("AutoModelForTokenClassification",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "multiple-choice": ("AutoModelForMultipleChoice",),
    "image-classification": ("AutoModelForImageClassification",),
    "image-segmentation": ("AutoModelForImageSegmentation", "AutoModelForSemanticSegmentation"),
    "object-detection": ("AutoModelForObjectDetection",),
    "depth-estimation": ("AutoModelForDepthEstimation",),
    READ_IMAGES: ("AutoModelForImageTextToText",),
    "zero-shot-image-classification": ("AutoModelForZeroShotImageClassification",),
    "audio-classification": ("AutoModelForAudioClassification",),
    "automatic-speech-recognition": ("AutoModelForSpeechSeq2Seq", "AutoModelForCTC"),
    "feature-extraction": ("AutoModel",),
    "image-feature-extraction": ("AutoModel",),
}

# What a LanguageModel can be for: it says tokens. The first that a family has, where its config names no class.
SAY_TOKENS = (
    NEXT_TOKEN,
    "text2text-generation",
    "summarization",
    "translation",
    "fill-mask",
    "automatic-speech-recognition",
)


def check_task(task: str) -> None:
    """Raises ModelError for a task that there is no class for, with the nearest that there is one for."""
    if task not in CLASSES:
        near = difflib.get_close_matches(str(task), CLASSES, n=2)
        raise ModelError(
            f"{task!r} is no task that is known here.",
            nearest=", ".join(repr(other) for other in near),
            known=", ".join(CLASSES),
        )


def task_of(name: str, config: Any, among: Sequence[str] = ()) -> str | None:
    """The task of a class of transformers' by its name, in this config's family; None where none is known for it."""
    for task in among or CLASSES:
        if any(name in _class_names(auto, config) for auto in CLASSES[task]):
            return task
    return None


def task_of_class(auto: Any) -> str:
    """The task of one of transformers' Auto classes, or of its name.

    Raises:
        ModelError: It is no such class, or none for a task that is known here.
    """
    name = auto if isinstance(auto, str) else getattr(auto, "__name__", repr(auto))
    found = next((task for task, autos in CLASSES.items() if name in autos), None)
    if found is None:
        raise ModelError(
            f"`automodel` is one of transformers' Auto classes, and `{name}` is none that is known here.",
            instead="task=, one of " + ", ".join(CLASSES),
        )
    return found


def is_of(name: str, auto: Any, config: Any) -> bool:
    """Whether a class of this name is one that an Auto class has for a config, or that class itself."""
    asked = auto if isinstance(auto, str) else getattr(auto, "__name__", "")
    if asked == name:
        return True
    known = {one for autos in CLASSES.values() for one in autos}
    return asked in known and name in _class_names(asked, config)


def loader(task: str | None, config: PreTrainedConfig, among: Sequence[str]) -> tuple[Any, str | None]:
    """The class that builds and loads the model, and the task that it is for.

    Args:
        task: None: the one of the class that the config names; without such a class, the first of `among` that the
            family has, or no head at all.
        config: The model's.
        among: The tasks that it may be for; any, where there are none.

    Raises:
        ModelError: The family has no model for this task, or for any of these.
    """
    if task is None and not among:
        return _named(config)
    if task is None:
        task = _named_or_first(config, among)
    check_task(task)
    remote: Any = getattr(config, "auto_map", None) or {}
    autos = CLASSES[task]
    fits = [auto for auto in autos if auto in remote or _class_names(auto, config)]
    if not fits:
        raise ModelError(
            f"`{config.model_type}` is not a model that predicts tokens."
            if task == NEXT_TOKEN
            else f"`{config.model_type}` is not a model that reads images and text."
            if task == READ_IMAGES and among
            else f"`{config.model_type}` has no model for the task {task!r}.",
            instead="nnsight.VisionLanguageModel(...)"
            if task == NEXT_TOKEN and _class_names("AutoModelForImageTextToText", config)
            else f"nnsight.TransformersModel(...){_tasks(config)}",
        )
    return getattr(transformers, fits[0]), task


def _named_or_first(config: PreTrainedConfig, among: Sequence[str]) -> str:
    remote: Any = getattr(config, "auto_map", None) or {}
    named = [task_of(name, config, among) for name in config.architectures or ()]
    own = [task for task in among if any(auto in remote or _class_names(auto, config) for auto in CLASSES[task])]
    return next((task for task in (*named, *own) if task is not None), among[0])


def _named(config: PreTrainedConfig) -> tuple[Any, str | None]:
    remote: Any = getattr(config, "auto_map", None) or {}
    for task, autos in CLASSES.items():
        for auto in autos:
            if auto in remote:
                return getattr(transformers, auto), task
    for name in config.architectures or ():
        if (known := task_of(name, config)) is not None:
            auto = next(auto for auto in CLASSES[known] if name in _class_names(auto, config))
            return getattr(transformers, auto), known
        if isinstance(kind := getattr(transformers, name, None), type):
            return _Plain(kind), None
    return transformers.AutoModel, "feature-extraction"


class _Plain:
    """A class of transformers' that none of its own tables has, used as those are."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def from_config(self, config: PreTrainedConfig, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        return self._kind._from_config(config, **options)

    def from_pretrained(self, where: str, **options: Any) -> Any:
        options.pop("trust_remote_code", None)
        return self._kind.from_pretrained(where, **options)


def _class_names(auto: str, config: Any) -> tuple[str, ...]:
    """The names of the classes that an Auto class has for a config; read off its table, and nothing is imported."""
    names = getattr(transformers, auto)._model_mapping._model_mapping.get(getattr(config, "model_type", None), ())
    return names if isinstance(names, tuple) else (names,)


def _tasks(config: PreTrainedConfig) -> str:
    has = [task for task, autos in CLASSES.items() if any(_class_names(auto, config) for auto in autos)]
    return ", for " + ", ".join(has[:4]) if has else ""
