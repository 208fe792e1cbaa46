"""Training around the model, in wings: data, pretrain, evaluate, ablation, demo. A script of one's own needs none of it."""
