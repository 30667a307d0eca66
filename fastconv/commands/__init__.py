"""``python -m fastconv COMMAND``: one module for each, with ``add_arguments`` and ``run``."""
