"""A folder for sys.path, with one module: tinycudann."""
