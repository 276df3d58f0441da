"""Packages that only some models need: where one isn't there, the error has the command that installs it."""

from __future__ import annotations

import importlib.util
from typing import Any

from nnsight.errors import MissingPackageError


def imported(package: str, what: str, extra: str) -> Any:
    """The package.

    Args:
        package: By its name in Python.
        what: What needs it, as the error begins.
        extra: Of nnsight's, that brings it.

    Raises:
        MissingPackageError: It isn't there, or fails to be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{what} needs the package `{package}`, which can't be imported.",
            because=None if isinstance(error, ModuleNotFoundError) and error.name == package else str(error),
            install=_install(extra),
        ) from None


def check_installed(package: str, what: str, extra: str) -> None:
    """Raises MissingPackageError where the package isn't there; it is not imported yet. Arguments as in `imported`."""
    if importlib.util.find_spec(package) is None:
        raise MissingPackageError(
            f"{what} needs the package `{package}`, which isn't installed.", install=_install(extra)
        )


def _install(extra: str) -> str:
    return f'pip install "nnsight[{extra}]"'
