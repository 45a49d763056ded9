"""Steps that went wrong: a loss or a gradient that is not finite, or far above those before it."""

from __future__ import annotations

import math
import statistics
from collections import deque

from pissa_cli.errors import PissaError
from pissa_cli.schema.recipe import Recipe

WINDOW, FEWEST = 50, 10  # sound steps before, of which the median is taken, and without which there is none
IN_A_ROW = 10  # faults that end a run


class Faults:
    """Judges steps one by one; `seen` are (loss, gradient norm) of sound ones before, the newest last."""

    def __init__(self, recipe: Recipe, seen: list[tuple[float, float]]) -> None:
        self._recipe = recipe
        self._sound = deque(seen, WINDOW)
        self._in_a_row = 0

    def judge(self, step: int, loss: float, grad_norm: float, saved: int) -> str | None:
        """What is wrong with step `step` (from 1); None if it is sound. `saved`: the step of the last checkpoint, or 0.

        Raises PissaError where the recipe says so, where there is nothing to go back to, at the tenth in a row, and
        for a first gradient of zero.
        """
        if grad_norm == 0 and not self._sound:
            raise PissaError(
                f"step {step}: the gradient is zero, so that nothing would be learned",
                "set train.torch_compile and train.use_liger_kernel to false, and please report it with the model",
            )
        fault = self._fault(loss, grad_norm)
        if fault is None:
            self._sound.append((loss, grad_norm))
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        train = self._recipe.train
        if train.on_fault == "stop" or (train.on_fault == "rollback" and not saved) or self._in_a_row == IN_A_ROW:
            times = f", {self._in_a_row} times in a row" if self._in_a_row > 1 else ""
            kept = f"step {saved} is saved" if saved else "no checkpoint was saved yet"
            raise PissaError(
                f"step {step}: training has diverged ({fault}{times}); {kept}",
                f"begin a new run (another --output) with a lower train.lr (now {self._recipe.lr:g}) or "
                "train.max_grad_norm, and check the data; with train.on_fault: skip, --resume leaves such steps out",
            )
        return fault

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss}, gradient norm {grad_norm}"
        limit = self._recipe.train.spike
        if limit is None or len(self._sound) < FEWEST:
            return None
        usual = [statistics.median(values) for values in zip(*self._sound, strict=True)]
        for name, value, median in zip(("loss", "gradient norm"), (loss, grad_norm), usual, strict=True):
            if value > limit * median:
                return f"{name} {value:.4g} is {value / max(median, 1e-30):.3g} times the usual {median:.4g}"
        return None
