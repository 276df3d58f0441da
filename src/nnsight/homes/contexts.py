"""Where programs written for the existing package look for `Tracer`, in its early versions."""

from nnsight.homes import old_home

__getattr__ = old_home(__name__, "Invoker", "Runner", "Tracer", "session", "session.Session")
