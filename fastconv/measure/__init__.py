"""How results and times are measured: tolerance, tables, the machine."""
