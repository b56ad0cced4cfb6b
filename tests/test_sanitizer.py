"""compute-sanitizer over the ops' tests on a CUDA device (bench/gpu.sh --stage sanitize)."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).with_name("test_gpu.py")
# Odd shapes of each op, one type: names of tests of that file.
CHOSEN = "contract or tail_ops or 256-768-77-dtype0 or 63-counts1-6-True-dtype0 or counts6-dtype0 or packed_attention"
LIMIT_S = 140


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed on this machine")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-k", CHOSEN, str(OPS)]
    # PyTorch's allocator hides overruns inside its own blocks.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told = running.communicate(timeout=LIMIT_S)[0]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)  # what it watches as well
    assert running.returncode == 0, told[-4000:]


def test_every_chosen_test_exists():
    """Without a device too: else a test that was renamed would be left out silently."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", str(OPS)]
    tests = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in CHOSEN.split(" or "):
        assert any(name in test for test in tests), name
