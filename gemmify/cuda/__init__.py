"""NVIDIA GPUs, as the driver of a compilation and of a run sees them: the compiler for device code, how its result is
packed into a library, and whether a machine can run it. Nothing of it is imported for a CPU."""
