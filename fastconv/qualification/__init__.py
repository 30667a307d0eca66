"""How candidates are found, judged and timed on the machine where they will run, see `fastconv.qualify`."""
