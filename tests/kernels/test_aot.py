"""The kernels compile for real GPUs, also where there is none, and keep their tiles in registers."""

import json
import os
import subprocess
import sys

SHARED_MEMORY = 227 * 1024  # per program on sm_90


def test_kernels_compile_for_hopper_without_spills() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "fastssl_kernels.triton.aot", "90", "bfloat16", "128"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usages = [json.loads(line) for line in done.stdout.splitlines()]
    assert {usage["kernel"] for usage in usages} == {"read_kernel", "labelled_read_kernel", "combine_kernel"}
    for usage in usages:
        assert usage["stack"] == 0, usage
        assert usage["shared"] <= SHARED_MEMORY, usage
