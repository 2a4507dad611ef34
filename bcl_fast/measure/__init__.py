"""Measuring: who takes part, by which clocks, against which floor. `bench/` and the command line are thin callers."""
