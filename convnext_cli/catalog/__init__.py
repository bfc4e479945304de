"""Facts with sources: models, data sets, devices. No logic beyond arithmetic, no torch."""
