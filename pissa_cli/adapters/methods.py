"""The table of methods. A new one is a file beside this one, an options class in `schema/adapter_options.py`, and a
line here.

`full` trains the weights themselves and has no row.
"""

from __future__ import annotations

from pissa_cli.adapters.loftq import LOFTQ
from pissa_cli.adapters.lora import LORA
from pissa_cli.adapters.pissa import PISSA
from pissa_cli.adapters.start import Method
from pissa_cli.adapters.svfit import SVFIT
from pissa_cli.adapters.vera import VERA

METHODS: dict[str, Method] = {"lora": LORA, "pissa": PISSA, "loftq": LOFTQ, "svfit": SVFIT, "vera": VERA}
