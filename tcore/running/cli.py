"""The edge of every command: an InputError becomes one line on stderr, not a traceback."""

import sys
from collections.abc import Callable

from tcore.files import InputError


def run(main: Callable[[], None]) -> None:
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
