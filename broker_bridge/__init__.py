"""Everything that touches the broker: what is said, and how it travels.

The only room that `device_client` and `server` share. It imports neither.
"""
