"""A folder for sys.path, with one module: nerfacc."""
