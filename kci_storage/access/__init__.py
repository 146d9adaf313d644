"""Access control: tokens and permissions, crawlers, networks, limits, and the browser challenge."""
