"""Training with a process that is killed once: `python -m tests.elastic_fixtures STAGE ...`.

Rank 1 of the first attempt kills itself, as the kernel would: in `features` of `gram_core.train` when its parts begin,
in `meta`, or in the `toy` of `meta_fixtures`, some steps after a state was kept. What follows are their words.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import torch

VICTIM = {"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
STAGES = {  # what is run, and the call in which it is killed
    "features": ("gram_core.train", "gram_core.pairs", "samples_of", 0),
    "meta": ("gram_core.train", "gram_core.meta", "outer_step", 3),
    "toy": ("tests.meta_fixtures", "gram_core.meta", "outer_step", 10),
}


def main() -> Any:
    torch.set_num_threads(1)
    program, owner, name, last = STAGES[sys.argv.pop(1)]
    if all(os.environ.get(key) == value for key, value in VICTIM.items()):
        module = importlib.import_module(owner)
        whole, calls = getattr(module, name), 0

        def one(*args: Any, **options: Any) -> Any:
            nonlocal calls
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return whole(*args, **options)

        setattr(module, name, one)
    return importlib.import_module(program).main()


if __name__ == "__main__":
    sys.exit(main())
