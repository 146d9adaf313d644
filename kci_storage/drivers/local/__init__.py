"""The driver for a folder of this machine."""
