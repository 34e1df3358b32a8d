"""Discriminators on the feature maps of frozen networks."""
