#!/usr/bin/env python
"""Break a cluster on this machine at random for a while, under load, and judge what its clients saw.

Run from the repository's root: `python -m scripts.soak`. Exits with 1 when anything was not as it must be; `--seed`
repeats what was drawn. See tests/system/soak.py for the rules.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path

from tests.system.machines import can_be_elsewhere
from tests.system.soak import Kind, soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--machines", type=int, default=3, help="beside the head's own")
    parser.add_argument("--workers", type=int, default=2, help="of the head's own machine")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--kinds", nargs="*", type=str.upper, choices=[kind.name for kind in Kind], default=None)
    parser.add_argument("--logs", type=Path, default=None, help="a directory for what every process said")
    parser.add_argument("--quiet", action="store_true", help="only the table")
    given = parser.parse_args()
    if not can_be_elsewhere():
        print("This needs `unshare --uts`: run it as root on Linux.", file=sys.stderr)
        return 2

    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    report = soak(
        seed=seed,
        num_faults=given.faults,
        duration_s=given.seconds,
        num_machines=given.machines,
        num_workers=given.workers,
        num_clients=given.clients,
        kinds=[Kind[name] for name in given.kinds] if given.kinds else tuple(Kind),
        tell=lambda line: None if given.quiet else print(time.strftime("%H:%M:%S"), line, flush=True),
        logs=given.logs,
    )
    print(report.table())
    for violation in report.violations:
        print(f"violation: {violation}")
    print(f"seed {seed}: {'FAILED' if report.violations else 'passed'}")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
