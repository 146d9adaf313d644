"""Who is let in: names, addresses, how much at once, and browsers that must prove that they are some."""
