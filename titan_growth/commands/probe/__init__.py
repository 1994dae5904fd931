"""`titan_growth probe`: several growths of one checkpoint, each trained for a few steps, ranked."""
