"""XMem: masks of objects on a first frame carried through a video with bounded memory. Our own program; `docs/xmem.md` says why it is as it is."""

from .config import XMemConfig, XMemDims

__all__ = ["XMem", "XMemConfig", "XMemDims", "XMemGroupTracker", "XMemTracker", "load_xmem"]

_HOMES = {"XMem": "network", "XMemGroupTracker": "tracker", "XMemTracker": "tracker", "load_xmem": "loading"}


def __getattr__(name: str):
    """Names that need torch are imported when first asked for, so that settings can be read without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
