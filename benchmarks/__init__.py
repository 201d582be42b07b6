"""Measurements of the method."""

import dopsd  # noqa: F401 - before bitsandbytes is imported, one of whose messages it mutes
