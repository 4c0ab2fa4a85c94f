"""What each command of `hpo` does: one file a noun or verb."""
