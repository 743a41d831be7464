"""The functions that `main` is divided into on a GPU (see `fixed_arena`); a run needs these names, no compiler."""

ARENA, RUN = "gemmify_arena", "gemmify_run"
