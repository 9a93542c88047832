"""Long-context evaluation: tasks, prompts, metrics, and the runner behind `hillinfer eval`."""
