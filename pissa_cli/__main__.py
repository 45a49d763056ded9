"""Entry point of the `pissa` command and of `python -m pissa_cli`."""

import os
import sys
from contextlib import suppress

from pissa_cli.heap import for_good, restart_with_lean_heap


def main() -> None:
    """Run the command line and exit with its code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    try:
        _main()
    except KeyboardInterrupt:  # while modules are imported, or a second one while a command says so itself
        with suppress(OSError):
            os.write(2, b"error: interrupted\n")
        os._exit(130)  # after `sys.exit` Python may end by SIGINT


def _main() -> None:
    if sys.argv[1:2] == ["train"] or "--dry-run" in sys.argv:
        restart_with_lean_heap()
    with for_good():
        from pissa_cli.cli import run
    run()


if __name__ == "__main__":
    main()
