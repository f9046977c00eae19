"""The JSON records of reports."""
