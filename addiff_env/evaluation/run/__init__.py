"""A run folder: planned, made, kept, merged."""
