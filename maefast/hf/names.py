"""Translation of tensors' names between transformers' and official ones."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.candidates import official_names
from ..checkpoint.layouts import transformers_names


def their_names(names: Iterable[str], outer: str) -> set[str]:
    """Return official names by transformers' names, for those that it has, without `outer`."""
    known = set[str]()
    for name in names:
        try:
            known |= transformers_names({name: torch.empty(3, 1)}).keys()
        except KeyError:
            known.add(name)
    return {name.removeprefix(outer) for name in known}


def to_transformers_names(module: Any, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}{module._inner}."
    own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(inner)}
    named = transformers_names({name.removeprefix(inner): tensor for name, tensor in own.items()})
    state_dict.update({prefix + name.removeprefix(module._outer): tensor for name, tensor in named.items()})


def to_own_names(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    begins = ("embeddings.", "encoder.", "layers.", "layernorm.") if module._outer else ("vit.", "decoder.")
    theirs = {
        name: state_dict.pop(name) for name in list(state_dict) if name.startswith(tuple(prefix + begin for begin in begins))
    }
    if theirs:
        named = official_names({name.removeprefix(prefix): t for name, t in theirs.items()}, Path("the state_dict"))
        state_dict.update({f"{prefix}{module._inner}.{name}": tensor for name, tensor in named.items()})
