"""An edit, and the plain hook that does the same."""

import sys

import pytest

can_leave_out_all = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12 can't leave out such a body, and says so"
)


def hooked(module, at, change, *args, **kwargs):
    """What `module` returns with a plain torch hook on the output of `at`."""
    handle = at.register_forward_hook(lambda _, __, output: change(output))
    try:
        return module(*args, **kwargs)
    finally:
        handle.remove()


def doubled(mlp):
    with mlp.edit() as edited:
        edited.layers[1].output = edited.layers[1].output * 2
    return edited
