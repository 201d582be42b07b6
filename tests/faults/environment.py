"""What must be set before any library is imported."""

import os


def prepare() -> None:
    """No hub, no telemetry, and one thread, since tiny models gain nothing from more. As in conftest.py."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
