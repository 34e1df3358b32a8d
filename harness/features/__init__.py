"""Feature networks: image features for metrics, discriminators and text encoders."""
