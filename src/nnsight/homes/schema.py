"""Where programs written for the existing package look for its settings."""

from nnsight.homes import old_home

__getattr__ = old_home(__name__, "config", "request", "response", "Request", "Response")
