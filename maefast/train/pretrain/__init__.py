"""`maefast pretrain` and `maefast submit`."""
