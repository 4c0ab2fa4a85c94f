"""Names in a storage that several packages use."""

METADATA = "hpo"
"""Study attribute of a study's metadata, for machines without study.yaml."""
LONG = {METADATA: "hpo:metadata", "space": "hpo:space", "length_probe": "hpo:length_probe"}
"""Study attributes that are system attributes of these names: `optuna studies` and the dashboard print all user
attributes. In version 0.1.0 these were user attributes too."""
