"""`import nerfacc` in a process that was started by one where ours is installed."""

from dreamfusion_fast import compat

if __name__ == "nerfacc":
    compat.install(__name__, force=True)  # this module's place is taken by ours
