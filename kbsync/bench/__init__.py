"""Measurements of the engine: one module per `kbsync bench` command. What they print is a value first, a table second."""
