"""Detect NVIDIA's apex without an import, and not the package of that name on PyPI."""

from importlib.machinery import PathFinder
from importlib.util import find_spec

SOURCE = "https://github.com/NVIDIA/apex"


def why_not(module: str, extension: str) -> str | None:
    """Return None where NVIDIA's apex has `apex.<module>` and its extension, else the reason."""
    apex = find_spec("apex")
    if apex is None:
        return f"NVIDIA's apex is not installed ({SOURCE}; the package named apex on PyPI is an unrelated one)"
    if PathFinder.find_spec(f"apex.{module}", apex.submodule_search_locations or []) is None:
        return f"the apex that is installed is not NVIDIA's ({SOURCE}): it has no module apex.{module}"
    if find_spec(extension) is None:
        return f"NVIDIA's apex was built without its CUDA extension {extension}"
    return None
