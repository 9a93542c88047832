"""What model families need: which layers can be tiered, and the exact way for attention that no selection can serve."""
