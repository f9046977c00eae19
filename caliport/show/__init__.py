"""Results for people: tables in the terminal, and what a CI job shows."""
