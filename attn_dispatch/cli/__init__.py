"""The command line: `doctor`, `verify`, `bench`, `generate`. Nothing of the library imports this."""
