"""One file per backbone: its registration and its denoisers."""
