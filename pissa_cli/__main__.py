"""Entry point of the `pissa` command and of `python -m pissa_cli`."""

from pissa_cli.cli import main

if __name__ == "__main__":
    main()
