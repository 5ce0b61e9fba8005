"""Questions, one folder each, and what asks and answers them: `run` and `report`."""
