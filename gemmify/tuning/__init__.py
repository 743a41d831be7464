"""Auto-tuning: lowering and schedule of every layer, measured on the machine that will run them, in a log that lasts.

The folder reads in the order of the work: `task` (what is tuned), `space` and `point` (what may be chosen), `bound`
(what cannot win), `search` (what is tried next), `measure` (each candidate in a process of its own), `record` and `log`
(what was found), `verdict` (what a compilation uses), `session` (the whole of it).
"""
