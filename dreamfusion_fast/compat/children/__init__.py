"""Folders that `compat.install` adds to sys.path, which processes started by `spawn` inherit.

What lies in sys.modules they do not inherit: they find `import nerfacc` by these folders.
"""
