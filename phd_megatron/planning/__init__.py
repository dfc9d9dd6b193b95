"""What a run costs, from its configuration alone."""
