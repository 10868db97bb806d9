"""What the scripts of this folder share: data that is prepared where it is missing."""
from data import prepare, synthetic
from data.dataset import find_folder, read_meta
from engine.cli import check


def prepared_task(task, allow_code_execution):
    """Return (input_len, target_len) of a prepared task; one of the embedded ones is prepared first. Raises UserError."""
    if task in synthetic.TASKS and find_folder(task) is None:
        prepare.main([task])
    path, meta = read_meta(task)
    check(meta["kind"] == "task", f"{path} holds text, not a task")
    check(meta.get("metric") != "code" or allow_code_execution,
          f"{task}: scoring it means running programs that a model wrote; read the top of scoring/sandbox.py, then say "
          f"--allow_code_execution")
    return meta.get("input_len", 64), meta.get("target_len", 64)


def prepared_text(text, out):
    """Return the folder of the text to pretrain on: `text`, or mostly Python source in a new folder, as in demo.py."""
    if text is None:
        prepare.main(["text", "--sources=stdlib:docs:0.2,stdlib:code:0.8", f"--out={out}/text"])
    return text or f"{out}/text"
