"""pointwise_conv2d_group on layers of the networks; how to read the times is in README.md."""

from harness import suite

test_forward, test_backward = suite("pointwise_conv2d_group")
