"""Facts with sources: models, data sets, ways of a block. No logic beyond arithmetic, no torch."""
