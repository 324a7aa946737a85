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


def unpack(path, root):
    """Make the folder root of an uploaded zip; False where the zip holds something else."""
    unpacked = root.with_name(f"{root.name}-unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(Path(name).name == "colab_setup.sh" for name in archive.namelist()):
                return False
            archive.extractall(unpacked)  # writes nothing outside that folder, whatever the archive's names are
        min(sorted(unpacked.rglob("colab_setup.sh")), key=lambda p: len(p.parts)).parent.rename(root)
        return True
    except Exception as error:  # damaged bytes trip zipfile in many ways
        sys.exit(f"{path}: upload not finished or damaged: {error}; upload it again, then run this cell again.")
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def fetch(root):
    """Put the repository into the folder root: from an uploaded zip if there is one, else by git."""
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        sys.exit(f"{root} is not the repository: it has no colab_setup.sh. Rename it and run this cell again.")
    uploaded = sorted(root.parent.glob(f"{root.name}*.zip"))
    if any(unpack(path, root) for path in uploaded):
        return
    if uploaded:
        names = ", ".join(map(str, uploaded))
        sys.exit(
            f"{names} is not the repository: no colab_setup.sh is in it. Remove it and run this cell again."
        )
    if not shutil.which("git"):
        sys.exit(f"There is no git here. Upload the zip of {ADDRESS} to {root.parent} and run this cell again.")
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # a question could not be answered here
    if subprocess.run(["git", "clone", "-q", "--depth", "1", ADDRESS, str(root)], env=environment).returncode:
        sys.exit(f"Could not fetch {ADDRESS}. Upload its zip to {root.parent} and run this cell again.")


root = next((p for p in [Path.cwd(), *Path.cwd().parents] if (p / "colab_setup.sh").exists()), None)
if root is None:
    root = Path.cwd() / "bklm"
    if not (root / "colab_setup.sh").exists():
        fetch(root)
    environment = {**os.environ, "BKLM_PYTHON": sys.executable}
    if subprocess.run(["bash", str(root / "colab_setup.sh")], env=environment).returncode:
        sys.exit("The set-up failed; its own message is above.")
if str(root) not in sys.path:
    sys.path.insert(0, str(root))
os.chdir(root)
