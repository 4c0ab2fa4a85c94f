"""The search of one worker: claim a trial, train it, report its epochs, finish it, until none waits (`loop.py`).

`objective.py` trains a trial and asks the pruner after each epoch; `recipes.py` trains the recipes that are not trials;
`weights.py` keeps the best networks; `interrupts.py` delays Ctrl-C and other signals until an epoch is saved.
"""
