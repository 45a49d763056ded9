"""The command line: parse, load the recipe, call the core, print. No heavy import before a command runs."""

import atexit
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from pissa_cli import __version__
from pissa_cli.cli.edge import keep_stdout_for_document, leave_at_once, of_several, run_guarded, settle_streams
from pissa_cli.cli.evaluate import evaluate_command
from pissa_cli.cli.export import export_command
from pissa_cli.cli.init import init_command
from pissa_cli.cli.merge import merge_command
from pissa_cli.cli.quantize import quantize_command
from pissa_cli.cli.train import train_command
from pissa_cli.errors import UsageError

YES = ("y", "yes", "t", "true", "on", "1")
"""What Accelerate takes for a yes in the environment."""
app = typer.Typer(
    name="pissa",
    help="Fine-tune language models by the part of each weight that matters most.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("init")(init_command)
app.command("train")(train_command)
app.command("eval")(evaluate_command)
app.command("merge")(merge_command)
app.command("quantize")(quantize_command)
app.command("export")(export_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pissa {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    try:
        Path.cwd()
    except FileNotFoundError:  # libraries fail there, or end the process
        raise UsageError("the working directory is gone", "start in a folder that is there") from None
    if sys.flags.optimize > 1:
        raise UsageError("python -OO takes away texts that transformers needs", "use -O at most, or PYTHONOPTIMIZE=1")


def run() -> None:
    """Run the command line and exit with its code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # of NVIDIA's containers: fp32 products of 10 bits
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one rule for Accelerate, transformers and torch
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not by nohup
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    settle_streams()
    if "--json" in sys.argv and "--help" not in sys.argv:
        keep_stdout_for_document()
    code = run_guarded(lambda: app(standalone_mode=False), sys.argv[1:])
    if code != 130 and not of_several():
        atexit._run_exitfuncs()
    leave_at_once(code)
