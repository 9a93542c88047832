"""When it happens: the record of a run now; lookahead, prefetch and balance stand here as they come."""
