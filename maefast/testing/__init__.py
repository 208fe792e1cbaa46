"""The error rule, awkward layouts and the timer of tests, benchmarks and `python -m
maefast.kernels.tune`."""
