"""Where programs written for the existing package look for names that are in nnsight itself: `Envoy`, `eproperty`."""

from nnsight.absent import old_home

__getattr__ = old_home(__name__, "envoy", "eproperty", "tracing", "tracing.base", "tracing.globals", "tracing.tracer")
