"""Requests made from the OpenAPI document, sent to the app in this process; what was sent and what came back, as JSON.

    python benchmarks/fuzz.py [--examples 300] [--seed N]

For every operation, and for each form of a classification alone: as many random right requests and as many wrong ones
as `--examples` says, and once the limits of every field. Each answer is held to the document and to the rules of
`tests/fuzz_fixtures.py`; the first that breaks one ends the run with its seed. `-m slow` of the suite does the same
within a bound of time.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.fuzz_fixtures import TALLY, calling, cover, fake_app, fuzz, operations


def main() -> None:
    """Fuzz, then print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    with calling(fake_app()) as caller:
        for form, label in operations():
            fuzz(caller, form, label, "positive", options.examples, options.seed)
            if "POST" in label:
                fuzz(caller, form, label, "negative", options.examples, options.seed)
            cover(caller, form, label)
    sys.stdout.write(json.dumps({"seed": options.seed, **TALLY.report()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
