"""The demo: a small model, arithmetic stories, and `python -m pissa_cli.demo`, the whole job on them."""
