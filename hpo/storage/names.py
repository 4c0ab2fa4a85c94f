"""Names in a storage that several packages use."""

METADATA = "hpo"
"""Study user attribute of a study's metadata, for machines without study.yaml."""
