"""The command ``kci-storage`` and its subcommands."""
