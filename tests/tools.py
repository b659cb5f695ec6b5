"""Programs of the system that some tests need."""

import os
import shutil

import pytest


def needed(name: str, package: str) -> str:
    """Its path; skips where it is missing, unless SYNTHIA_REQUIRE_SERVICES=1."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        reason = f"{name} is not installed (Debian: {package})"
        if os.environ.get("SYNTHIA_REQUIRE_SERVICES") == "1":
            pytest.fail(f"{reason}; SYNTHIA_REQUIRE_SERVICES=1 asks for it")
        pytest.skip(reason)
    return found
