"""The work of each verb of the command line: `execute(...)` returns plain data, `show(result)` prints it."""
