"""Real devices: a SmartSSD through XRT, raw block devices, NVMe passthrough."""
