"""Commands for devices: validate on them, list them, emulators, and runners to build."""
