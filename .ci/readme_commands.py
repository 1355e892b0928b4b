"""Run the README's other shell and Python blocks: those after a ``<!-- run -->`` mark, in order."""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- run -->\n+```(bash|python)\n(.*?)\n```", re.DOTALL)


def main() -> None:
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    if not blocks:
        sys.exit("README.md has no <!-- run --> blocks: was the mark renamed?")
    with tempfile.TemporaryDirectory() as folder:
        for language, text in blocks:
            print(f"\n$ {text}", flush=True)
            command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
            where = ROOT if "benchmarks/" in text else folder
            subprocess.run(command, check=True, cwd=where, timeout=300)


if __name__ == "__main__":
    main()
