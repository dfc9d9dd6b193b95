"""What stands on a terminal, and how plots are set up: flags, tables, progress, lines that are said once."""
