"""LeoAM (arXiv 2506.20187): a tree of chunks, its abstracts in pages on the drive, and INT4 records."""
