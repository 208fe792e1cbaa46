"""What tests, benchmarks and `python -m maefast.kernels.tune` share: the error rule, awkward layouts, the timer."""
