"""Where programs written for the existing package look for `Tracer` and, in its early versions, for proxies."""

from nnsight.homes import old_home

__getattr__ = old_home(
    __name__,
    "Proxy",
    "backend",
    "backends",
    "base",
    "contexts",
    "globals",
    "graph",
    "graph.proxy",
    "hint",
    "tracer",
    "util",
)
