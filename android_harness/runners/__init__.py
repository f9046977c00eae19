"""Programs that run artifacts on a device, and the job and result they exchange."""
