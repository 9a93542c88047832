"""Questions about long documents: tasks, prompts, the runner."""
