"""One file per algorithm, registered by its file name. Methods never import each other."""
