"""Reports from the JSON files of a run: HTML page, Markdown summary, JUnit."""
