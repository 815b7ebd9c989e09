"""The commands of `midge`, a file for each of the things an operator does."""
