"""How results and times are measured.

What is right (tolerance.py), which layers and networks are measured (calls.py, layers.py, networks.py), how time and
memory are taken (timing.py, memory.py, ceilings.py), and what figures are reported with (environment.py, report.py).
Whole networks are measured in inference.py and training.py, by the contenders of contenders.py.
"""
