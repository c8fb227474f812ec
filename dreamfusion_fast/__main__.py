"""python -m dreamfusion_fast: the command line; with --cmakedir, prints the folder of the C++
library's CMake files, which is find_package's dreamfusion_fast_DIR (docs/cpp.md)."""

import sys
from pathlib import Path

if sys.argv[1:] == ["--cmakedir"]:
    folder = Path(__file__).resolve().parent / "cmake"
    if not folder.is_dir():
        sys.exit(f"{folder}: not found: dreamfusion_fast was not installed by pip")
    print(folder)
else:
    from .cli import main

    main()
