"""Settings that hold for every test: few threads, no network, nothing random.

The variables are read when torch, onnxruntime and transformers are first imported,
so they are set here, before any test module is.
"""

from __future__ import annotations

import os

from hypothesis import settings

# Workers of pytest-xdist share the cores, and inherit what the process that starts them has set.
is_worker = "PYTEST_XDIST_WORKER" in os.environ
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1" if is_worker else os.environ.get(variable, "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# A value in the developer's shell must not steer a test.
for variable in [name for name in os.environ if name.startswith("MTL_EXPORT_")]:
    if variable not in {"MTL_EXPORT_FIXTURES", "MTL_EXPORT_REPORTS"}:
        del os.environ[variable]

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("repeatable")
