"""What is important: key codes, exact integer scores, top-k, and the policies. Knows torch and numpy only."""
