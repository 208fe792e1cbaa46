"""`maefast demo`."""
