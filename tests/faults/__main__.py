"""python -m tests.faults: see `faults`."""

import sys
from pathlib import Path

from .environment import prepare


if __name__ == "__main__":
    prepare()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' own modules

    from .report import main

    sys.exit(main())
