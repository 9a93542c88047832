"""The named systems: the registry, and a folder for each paper."""
