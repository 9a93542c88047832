"""Token importance: key codes, exact integer scores, top-k and the policies. Depends on torch and numpy only."""
