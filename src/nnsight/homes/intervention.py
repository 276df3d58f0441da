"""Where programs written for the existing package look for names that are in nnsight itself: `Envoy`, `eproperty`."""

from nnsight.homes import old_home

__getattr__ = old_home(
    __name__,
    "backends",
    "backends.base",
    "backends.remote",
    "backward",
    "barrier",
    "base",
    "batching",
    "cache",
    "contexts",
    "editing",
    "envoy",
    "eproperty",
    "errors",
    "graph",
    "graph.proxy",
    "interleaver",
    "iterator",
    "source",
    "tracer",
    "tracing",
    "tracing.base",
    "tracing.globals",
    "tracing.tracer",
    "tracing.util",
    "util",
)
