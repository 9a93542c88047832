"""The lossless systems, FlexGen (arXiv 2303.06865) and DUAL-BLADE (arXiv 2604.26557), and the raw devices they use."""
