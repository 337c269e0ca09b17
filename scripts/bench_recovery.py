"""How long streams pause when something under them dies: `python -m scripts.bench_recovery [--turns N]`.

A head with three workers, the embedded model in float32, four streams. Each turn strikes every worker in decode and
in prefill, by SIGKILL and by SIGSTOP, and checks that every text is that of the undisturbed run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import psutil

from tests.system.processes import Server, serve
from tests.system.recovery import LONG_PROMPT, in_decode, in_prefill, streams

NAMES = ("first", "middle", "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    pauses: dict[tuple[str, str, str], list[float]] = {}
    with serve("--workers", "3", "--dtype", "float32", "--max-batch-tokens", "64") as server:
        streams(server.url)
        for turn in range(turns):
            for phase in ("decode", "prefill"):
                for how in ("SIGKILL", "SIGSTOP"):
                    for which, name in enumerate(NAMES):
                        pause = struck(server, phase, how, which, f"{turn} {how} {which} ")
                        pauses.setdefault((phase, how, name), []).append(pause)
    print(f"{'struck in':<10}{'by':<9}{'worker':<8}{'median':>8}{'worst':>8}   seconds from piece to piece")
    for (phase, how, name), found in pauses.items():
        print(f"{phase:<10}{how:<9}{name:<8}{statistics.median(found):>8.2f}{max(found):>8.2f}")


def struck(server: Server, phase: str, how: str, which: int, prefix: str) -> float:
    """The longest pause of any stream; in prefill the time to the first piece beyond that of the undisturbed run."""
    victims: list[psutil.Process] = []

    def act() -> None:
        victims.append(server.workers()[which])
        (victims[0].kill if how == "SIGKILL" else victims[0].suspend)()

    prefix = f"{prefix}{LONG_PROMPT}" if phase == "prefill" else ""
    strike: Callable[..., None] = in_decode(act) if phase == "decode" else in_prefill(server, act)
    found = streams(server.url, prefix=prefix, strike=strike)
    right = streams(server.url, prefix=prefix)
    assert [stream.text for stream in found] == [stream.text for stream in right], "a text changed"
    assert all(stream.done for stream in found), [stream.error for stream in found]
    if phase == "decode":
        return max(stream.pause_s for stream in found)
    return max(stream.first_s for stream in found)


if __name__ == "__main__":
    main()
