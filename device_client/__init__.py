"""What runs on the Raspberry Pi: the command `midge-device`."""
