"""KV of prompts' beginnings in a folder, found again by any cache that is given the same tokens."""
