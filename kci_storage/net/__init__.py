"""Connections to clients: which of them cost the worker a thread, and which only wait."""
