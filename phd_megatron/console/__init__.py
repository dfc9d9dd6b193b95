"""What stands on a terminal: flags, tables, progress, lines that are said once."""
