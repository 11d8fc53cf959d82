"""Tests compute in float32 whatever the processor has, so that their tolerances hold everywhere."""

import os

os.environ["TCORE_PRECISION"] = "float32"
