"""What runs in place of the nodes that a pattern has matched: a file for each pattern, by the same name.

`fastconv.swapping.calls.call` says what all of them have. Convolutions run on weights that are
`fastconv.swapping.calls.prepared` for inference, in the formats of `fastconv.swapping.calls.onednn`.
"""
