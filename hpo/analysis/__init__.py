"""Numbers about a study, as plain dataclasses: baselines, costs, failures, pruning, outputs, suggestions, the doctor.

No sentences and no HTML: `hpo.report`, `hpo.cli` and the model card word and draw what is computed here.
"""
