# @title Set up: fetches the repository unless it is here (no access? upload its zip first) { display-mode: "form" }
import importlib.util
import runpy
import shutil
import subprocess
import tempfile
from pathlib import Path

here, address, script = Path.cwd(), "...", "colab_setup.sh"
known = getattr(importlib.util.find_spec("bklm"), "origin", None)  # a mere folder of that name has none
root = next((p for p in [here, *here.parents] if (p / script).exists()), None if known else here / "bklm")
if root and not (root / script).exists():
    if root.exists() and (root.is_file() or any(root.iterdir())):
        raise SystemExit(f"{root} is not the repository: it has no colab_setup.sh. Rename it, run this again.")
    with tempfile.TemporaryDirectory(prefix="bklm-", dir=here) as folder:
        for path in sorted(here.glob("bklm*.zip")):
            try:
                shutil.unpack_archive(path, Path(folder, path.stem))  # writes nothing outside that folder
            except Exception as error:  # damaged bytes trip it in many ways
                raise SystemExit(f"{path}: not finished or damaged ({error}); upload it again.") from None
        git, clone = shutil.which("git"), ["git", "clone", "-q", "--depth", "1", address, f"{folder}/clone"]
        if not any(Path(folder).rglob(script)) and (not git or subprocess.call(clone, start_new_session=True)):
            raise SystemExit(f"Could not fetch {address} by git. Upload its zip to {here} and run this again.")
        min(Path(folder).rglob(script), key=lambda p: (len(p.parts), p)).parent.rename(root)
root and runpy.run_path(str(root / "scripts" / "set_up.py"))["set_up"](root)
