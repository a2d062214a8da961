"""Train a small GPT on the source code of Python's standard library, byte by byte, with the attention of your choice.

python examples/train_gpt.py                            the device's default backend at a size for the machine
python examples/train_gpt.py --backend sdpa --steps 500 --checkpoints runs --resume
python examples/train_gpt.py --backend all              every backend from the same seed, and a picture of the losses
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from bench import INTERRUPTED, Parser, bad_input, known_backends
from flash2.backends import DEFAULTS, list_backends
from flash2.core.training import runs, session


def main() -> int:
    """Train, print the table and the sample; 0 if every run that could be made went well."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", help=f"a name, or all (default: {DEFAULTS['cuda']} on a GPU, else {DEFAULTS['cpu']})"
    )
    session.add_arguments(parser)
    asked = parser.parse_args()
    with bad_input(parser):
        names = list_backends() if asked.backend == "all" else [asked.backend] if asked.backend else []
        known_backends(parser, names)
        training = session.from_arguments(asked, names)
        training.defaults = {kind: (name,) for kind, name in DEFAULTS.items()}
        if asked.backend == "all" and not asked.plot:
            asked.plot = Path("loss.png")
        found = training.run()
        if len(found) == 1 and found[0].status in ("unavailable", "unsupported"):
            raise ValueError(f"{found[0].label} is {found[0].status}: {found[0].reason}")
        print(runs.table(found, asked.format))
        if asked.plot:
            runs.picture(found, asked.plot)
            print(f"loss curves: {asked.plot}")
    for run in found:
        if run.sample and asked.format == "table":
            print(f"\n--- {run.label} writes:\n{run.sample}")
    return 0 if all(run.status in ("ok", "unavailable", "unsupported") for run in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
