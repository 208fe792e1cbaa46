"""The target that a decoder was trained to predict."""

from typing import Any


def warn_of_target(checkpoint: Any, wanted: bool) -> list[str]:
    """Return a warning if the decoder was or may have been trained on another target."""
    target = checkpoint.facts.norm_pix_loss
    if target is None:
        return [unknown_target(f"norm_pix_loss is {wanted}")]
    if target != wanted:
        return [f"norm_pix_loss is {wanted}, and the checkpoint was trained with norm_pix_loss={target}"]
    return []


def unknown_target(taken: str) -> str:
    why = "the official visualize files, for example, were trained on raw pixels"
    return f"the checkpoint does not store whether its target was normalised pixels; {taken}; {why}"
