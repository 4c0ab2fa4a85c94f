"""What optuna-dashboard shows of a study: pictures, notes, and the server."""
