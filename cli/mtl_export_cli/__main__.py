"""The program ``mtl-export``: as ``main``, and quiet when it is interrupted while it starts."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

_INTERRUPTED = 130  # what a shell reports for SIGINT


def main() -> NoReturn:
    """Import and run the command line. Until it can answer Ctrl-C itself, nothing is written."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(_INTERRUPTED))
    from mtl_export_cli.main import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
