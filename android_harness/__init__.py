"""The same checks on a device over adb. Empty until the harness lands."""
