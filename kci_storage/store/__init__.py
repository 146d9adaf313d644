"""Objects: reading, storing and deleting them, whichever driver has them."""
