"""The command line: `doctor`, `verify`, `generate`. Nothing of the library imports this."""
