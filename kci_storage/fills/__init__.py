"""How a cold object comes into the cache while everybody who asked for it reads along."""
