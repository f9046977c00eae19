"""Verdicts on one artifact: a measure, its limit, and the stage that a failure belongs to."""
