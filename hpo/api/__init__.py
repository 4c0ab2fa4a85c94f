"""The library behind the command line: one function for each command.

Each takes one options model of `hpo.api.options`, prints nothing, and returns its result. Long-running functions also
take a `Reporter`, which shows progress (silent by default), and `Interrupts`, which handle Ctrl-C (by default it stops
at once). A new option is a field of its options model, and is read where it is used: the command line, `import hpo` and
the command that resumes a study follow.
"""
