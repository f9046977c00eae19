"""The same checks on a device over adb: devices, sessions, runners, parity and latency."""
