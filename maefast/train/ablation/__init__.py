"""`maefast ablate`."""
