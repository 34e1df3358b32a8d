"""Feature networks: everything that looks at images, for metrics and discriminators."""
