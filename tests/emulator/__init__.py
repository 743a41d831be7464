"""A CUDA driver without a GPU: README.md says what it emulates and how to use it."""

from .build import BuildError, libraries
from .process import (
    active,
    check_guards,
    driver,
    environment,
    gpu_count,
    install,
    last_error,
    set_capability,
    set_order,
    set_watched,
)
from .text import compile_text

__all__ = [
    "BuildError",
    "active",
    "check_guards",
    "compile_text",
    "driver",
    "environment",
    "gpu_count",
    "install",
    "last_error",
    "libraries",
    "set_capability",
    "set_order",
    "set_watched",
]
