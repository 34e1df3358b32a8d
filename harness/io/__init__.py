"""Files, locks, downloads and logging: everything that touches the disk or the terminal."""
