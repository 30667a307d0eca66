"""local_response_norm (LRN) on layers of the networks; how to read the times is in README.md."""

from harness import suite

test_lrn_forward, test_lrn_backward = suite("local_response_norm")
