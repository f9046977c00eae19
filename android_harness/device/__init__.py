"""Devices over adb: commands, facts and sessions."""
