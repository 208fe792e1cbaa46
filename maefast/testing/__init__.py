"""The error rule and the timer of tests, benchmarks and `python -m maefast.kernels.tune`."""
