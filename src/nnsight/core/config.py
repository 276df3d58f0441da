"""The few settings of the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from nnsight.absent import REMOTE, SETTINGS, Section, means_nothing

_SWITCHES = ("auto", "greenlet", "thread")


@dataclass(slots=True)
class Config:
    """Settings for the whole process; `nnsight.CONFIG` is the one instance.

    Attributes:
        switch: How a model's stack is kept apart from the block's: "greenlet", "thread" (slower, and needs no care of
            C++ stacks), or "auto", which takes threads only where `TORCH_SHOW_CPP_STACKTRACES` is set.
    """

    switch: str = "auto"
    API: ClassVar[Section] = Section("API")
    APP: ClassVar[Section] = Section("APP")

    def set_default_api_key(self, key: str | None = None) -> None:
        """For programs written for the existing package: warns that there is nothing that a key is for."""
        means_nothing("nnsight.CONFIG.set_default_api_key", REMOTE)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "switch" and value not in _SWITCHES:
            raise ValueError(f"CONFIG.switch is one of {', '.join(map(repr, _SWITCHES))}, not {value!r}")
        if name != "switch":
            self.__getattr__(name)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> NoReturn:
        why = SETTINGS.get(name, "The one setting is `switch`.")
        raise AttributeError(f"nnsight.CONFIG has no `{name}`. {why}")


CONFIG = Config()
