# @title Set up { display-mode: "form" }
# @markdown Opened from its badge in Colab, this fetches the repository and adds the missing packages (about a minute).
# @markdown In a checkout it does nothing. Without access to the repository, upload its zip to the files on the left first.
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ADDRESS = "..."


def fetch(root):
    """Put the repository into the folder root: from an uploaded zip that holds it, else by git."""
    if root.exists() and (root.is_file() or any(root.iterdir())):
        sys.exit(f"{root} is not the repository: it has no colab_setup.sh. Rename it and run this cell again.")
    unpacked = root.with_name(f"{root.name}-unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    for path in sorted(root.parent.glob(f"{root.name}*.zip")):
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(unpacked)  # writes nothing outside that folder
            if found := sorted(unpacked.rglob("colab_setup.sh"), key=lambda p: len(p.parts)):
                found[0].parent.rename(root)
                return
        except Exception as error:  # damaged bytes trip zipfile in many ways
            sys.exit(f"{path}: upload not finished or damaged: {error}; upload it again, then run this again.")
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
    clone = ["git", "clone", "-q", "--depth", "1", ADDRESS, str(root)]
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a question could not be answered here
    if not shutil.which("git") or subprocess.run(clone, env=quiet).returncode:
        sys.exit(f"Could not fetch {ADDRESS} by git. Upload its zip to {root.parent} and run this cell again.")


root = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "colab_setup.sh").exists()), None)
if root is None:
    root = Path.cwd() / "bklm"
    if not (root / "colab_setup.sh").exists():
        fetch(root)
    environment = {**os.environ, "BKLM_PYTHON": sys.executable}
    if subprocess.run(["bash", str(root / "colab_setup.sh")], env=environment).returncode:
        sys.exit("The set-up failed; its own message is above.")
sys.path.insert(0, str(root))
os.chdir(root)
