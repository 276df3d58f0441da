"""Lets an AttributeError of the model's out of a property as itself.

Python turns an AttributeError that a property raises into a call of `__getattr__`, which would report a misspelt name.
"""

from __future__ import annotations

import threading

_local = threading.local()


def let_escape(error: AttributeError) -> None:
    """Called by the property, which then raises the error:

    `except AttributeError as error: let_escape(error); raise`.
    """
    _local.error = error


def raise_escaped() -> None:
    """Called by `__getattr__` for the name of such a property: raises what the property raised."""
    error: AttributeError | None = vars(_local).pop("error", None)
    if error is not None:
        raise error
