"""How long objects are kept."""
