"""Running a model for people: completions of prompts, and a prompt loop in the terminal."""
