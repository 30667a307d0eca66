"""Below every backend: the operators' schemas, checks, registration and gradients, and the choice of a backend.

Nothing here knows of a public function (`fastconv.ops`), a module (`fastconv.nn`) or a kernel. What a caller hands in
passes through `arguments`; what reaches an operator, through `checks`.
"""
