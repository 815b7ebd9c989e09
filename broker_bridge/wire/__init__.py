"""What is said, as bytes. Nothing in this folder does input or output."""
