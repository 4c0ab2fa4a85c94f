"""Numbers about a study, as plain dataclasses. No sentences and no HTML: `hpo.report` and `hpo.cli` make these."""
