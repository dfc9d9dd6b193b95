"""The program that torchrun starts when a fault must fall on one moment: the real one, held at a system call.

``FAULT_MOMENT`` is ``rank:event:pattern:count:marker``. Just before the ``count``-th audit event ``event`` of that rank
whose path matches ``pattern`` the marker file is made, and the thread waits until it is gone. Nothing of the program is
changed; Python itself reports what it is about to do (``sys.addaudithook``).
"""

from __future__ import annotations

import os
import re
import runpy
import sys
import time


def install(text: str) -> None:
    """Hold this process as ``text`` says, when it is the rank that is meant."""
    rank, event, pattern, count, marker = text.split(":")
    if os.environ.get("RANK", "0") != rank:
        return
    wanted, seen = re.compile(pattern), 0

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if name != event:
            return
        # of a rename the second path counts; an opened file must be opened to be written
        path = arguments[1] if name == "os.rename" else arguments[0]
        if name == "open" and not int(str(arguments[2] or 0)) & os.O_ACCMODE:
            return
        if not isinstance(path, str | os.PathLike) or not wanted.search(os.fspath(path)):
            return
        seen += 1
        if seen == int(count):
            descriptor = os.open(marker, os.O_RDONLY | os.O_CREAT)
            os.close(descriptor)
            while os.path.exists(marker):
                time.sleep(0.001)

    sys.addaudithook(hook)


if __name__ == "__main__":
    install(os.environ["FAULT_MOMENT"])
    runpy.run_module("phd_megatron", run_name="__main__", alter_sys=True)
