"""Schedules: TIR -> scheduled TIR for one machine. Knows no convolution and imports nothing of `lowering`."""

from schedules.machine import Machine, TargetError, host_target, parse_target

__all__ = ["Machine", "TargetError", "host_target", "parse_target"]
