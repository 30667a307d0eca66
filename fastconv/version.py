"""The version of the package: a module of its own, for what is loaded before `fastconv` itself is complete."""

__version__ = "0.1.0"
