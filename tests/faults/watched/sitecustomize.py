"""Watches an interpreter that a watched one starts: this folder is on its PYTHONPATH."""

import os
import sys

if "LORAKIT_TESTS_WATCH" in os.environ:
    sys.path.insert(0, os.path.abspath(f"{__file__}/../../../.."))
    from tests.faults.audit import watch

    del sys.path[0]
    watch()
