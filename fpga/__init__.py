"""The SmartSSD's evaluation kernel: its simulation, synthesis and measured configurations. Not part of the package."""
