"""``python -m phd_megatron``, also the program that torchrun starts."""

from phd_megatron.runtime.launcher import die_with_launcher

die_with_launcher()  # before the imports, which take seconds

import os  # noqa: E402
import sys  # noqa: E402

from phd_megatron.cli.main import main  # noqa: E402
from phd_megatron.errors import RunLost  # noqa: E402


def program() -> int:
    """The exit code of the command line; a run that has lost a rank does not come back from here."""
    code = main()
    if code == RunLost.exit_code:
        # Others wait for this rank's end, and taking the interpreter down takes seconds. Everything is closed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    raise SystemExit(program())
