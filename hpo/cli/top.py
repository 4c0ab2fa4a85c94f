"""`hpo study top`: a running study, live."""

from __future__ import annotations

import time

from hpo.cli.console import console, live_screen, say_screen
from hpo.cli.monitor import look, screen
from hpo.study import find_study


def top_command(name: str | None, *, storage: str | None, every_s: float, once: bool) -> None:
    """Shows a study until nothing runs or waits, or until Ctrl-C.

    Only once where that is asked for, or without a terminal.
    """
    study = find_study(name, storage_url=storage)
    if once or not console.is_terminal:
        say_screen(screen(look(study)))
        return
    try:
        with live_screen() as show:
            while True:
                view = look(study)
                show(screen(view))
                if view.over:
                    return
                time.sleep(every_s)
    except KeyboardInterrupt:
        return
