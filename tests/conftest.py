"""What tests share is in `fixtures.py`; this file only decides who loads it."""

import os
import sys

import pytest

pytest.register_assert_rewrite("fixtures")

# With `-n 2` this process only hands the tests out to two others: the imports that they need would cost it ten seconds.
if "PYTEST_XDIST_WORKER" in os.environ or not any(each.startswith(("-n", "--numprocesses")) for each in sys.argv):
    from fixtures import *  # noqa: F403
