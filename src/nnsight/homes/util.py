"""Where programs written for the existing package look for `WrapperModule` and `fetch_attr`."""

from nnsight.homes import old_home

__getattr__ = old_home(__name__)
