"""What a process writes counts as its memory."""

import sys

import pytest

from fastconv.measure import memory, training
from fastconv.measure.contenders import CHANNELS_LAST


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_counts_activations():
    images = 2000
    # The input, and what the first convolution and its ReLU return, in float32.
    activations = images * 4 * (32 * 32 + 6 * 28 * 28)
    peak = memory.peak_bytes(training.run_steps, "lenet5", CHANNELS_LAST, str(images), "1", "fp32")
    assert activations < peak < 20 * activations


def test_a_process_that_fails(capfd):
    assert memory.peak_bytes(training.run_steps, "lenet6", CHANNELS_LAST, "1", "1", "fp32") is None
    assert "no peak memory of run_steps('lenet6'" in capfd.readouterr().err
