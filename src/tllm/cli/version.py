"""`tllm version`"""

from __future__ import annotations

import platform
from importlib import metadata

from tllm import __version__

_SHOWN = ("torch", "grpcio", "protobuf", "tokenizers", "safetensors", "fastapi", "uvicorn", "numpy")


def version() -> None:
    """Show the version of tllm and of what it stands on."""
    print(f"tllm {__version__}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _SHOWN:
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} (not installed)")
