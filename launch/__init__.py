"""Programs that start runs elsewhere: on TPU VMs, and many at once."""
