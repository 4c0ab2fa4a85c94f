"""The library behind the command line: one function for each command.

Each takes one options model of `hpo.api.options`, prints nothing, and returns its result. Long-running functions also
take a `Reporter`, which shows progress (silent by default), and `Interrupts`, which handle Ctrl-C (by default it stops
at once).
"""
