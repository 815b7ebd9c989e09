"""What runs the fleet: the command `midge`."""
