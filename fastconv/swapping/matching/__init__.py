"""What patterns are written over.

`fastconv.swapping.matching.effects` knows what a graph's nodes do to memory, and
`fastconv.swapping.matching.matcher` who reads which value, and what is part of a match already.
"""
