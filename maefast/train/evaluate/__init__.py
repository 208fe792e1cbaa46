"""`maefast extract`, `knn`, `linprobe`, `finetune`, `partial`, `reconstruct` and `robustness`."""
