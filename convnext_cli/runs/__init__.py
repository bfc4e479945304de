"""What remains: the run directory, its records and its plots."""
