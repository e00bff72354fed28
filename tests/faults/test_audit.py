"""What the hostile artifacts are watched with sees what it must."""

import subprocess
import sys
from pathlib import Path

from tests.faults.audit import watch_all
from tests.faults.forked import run


def test_an_interpreter_that_a_watched_one_starts_is_watched(tmp_path: Path) -> None:
    program = "import os, smtplib; os.system('true')"

    def action() -> None:
        watch_all(tmp_path / "events", (tmp_path,), ())
        subprocess.run([sys.executable, "-P", "-c", program], check=True)

    ended = run(action)
    assert ended.code == 0, ended
    events = (tmp_path / "events").read_text()
    assert "import ('smtplib'" in events
    assert "os.system (b'true',)" in events
