"""Schedules: TIR -> scheduled TIR for one machine. Knows no convolution and imports nothing of `lowering`."""

from schedules.cpu.knobs import knob_space
from schedules.cpu.rules import IS_SCHEDULED, schedule_func, schedule_module
from schedules.machine import Machine
from schedules.target import TargetError, host_target, parse_target

__all__ = [
    "IS_SCHEDULED",
    "Machine",
    "TargetError",
    "host_target",
    "knob_space",
    "parse_target",
    "schedule_func",
    "schedule_module",
]
