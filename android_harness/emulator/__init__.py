"""Android emulators: the SDK, virtual devices, and starting one."""
