"""Where KV bytes live: the model's device, host memory, a drive. Knows torch and numpy only."""
