"""A module's forward as a graph, or why that would not be safe.

`fastconv.swapping.tracing.tracer` has torch.fx run the forward; meanwhile
`fastconv.swapping.tracing.observing` sees to it that it does nothing but what is
`fastconv.swapping.tracing.harmless`, and `fastconv.swapping.tracing.reading` notes what it reads, whose
`fastconv.swapping.tracing.contents` can be compared later. `fastconv.swapping.tracing.modules` knows what a graph calls
as a whole.
"""
