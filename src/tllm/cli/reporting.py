"""How a command ends that could not do what it was told.

This file does not know which commands there are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tllm.core.errors import TllmError


@contextmanager
def reported() -> Iterator[None]:
    """An error of ours is one screen on stderr and exit status 1; a bug keeps its traceback."""
    try:
        yield
    except TllmError as error:
        print(f"tllm: {error}", file=sys.stderr)
        if error.__cause__ is not None and not isinstance(error.__cause__, TllmError):
            print(f"      ({type(error.__cause__).__name__}: {error.__cause__})", file=sys.stderr)
        sys.exit(1)
