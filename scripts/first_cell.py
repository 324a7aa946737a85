# @title Set up { display-mode: "form" }
# @markdown Opened from its badge in Colab, this fetches the repository and adds the missing packages (about a minute).
# @markdown In a checkout it does nothing. Without access to the repository, upload its zip to the files on the left first.
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ADDRESS = "..."


def fetch(root):
    """Put the repository into the folder root: from an uploaded zip if there is one, else by git."""
    uploaded = sorted(root.parent.glob(f"{root.name}*.zip"))
    if uploaded:
        unpacked = root.with_name(f"{root.name}-unpacked")
        with zipfile.ZipFile(uploaded[-1]) as archive:
            archive.extractall(unpacked)  # writes nothing outside that folder, whatever the archive's names are
        found = min(unpacked.rglob("colab_setup.sh"), key=lambda p: len(p.parts), default=None)
        if found is None:
            sys.exit(f"{uploaded[-1]} is not the repository: it has no colab_setup.sh. Remove it.")
        found.parent.rename(root)
        return
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a question could not be answered here
    if subprocess.run(["git", "clone", "-q", "--depth", "1", ADDRESS, str(root)], env=environment).returncode:
        sys.exit(f"Could not fetch {ADDRESS}. Upload its zip to {root.parent} and run this cell again.")


root = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "colab_setup.sh").exists()), None)
if root is None:
    root = Path.cwd() / "bklm"
    if not root.exists():
        fetch(root)
    environment = {**os.environ, "BKLM_PYTHON": sys.executable}
    if subprocess.run(["bash", str(root / "colab_setup.sh")], env=environment).returncode:
        sys.exit("The set-up failed; its own message is above.")
if str(root) not in sys.path:
    sys.path.insert(0, str(root))
os.chdir(root)
