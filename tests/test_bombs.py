"""Files made to exhaust a reader: each is refused in one line, within 2 s and 300 MB."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BEFORE = Path(__file__).parent / "data" / "before"
HEAD = '{"format": "interp-steer/rows/1", "model": "m", "dtype": "float32"}\n'
ROW = '{"key": "a", "chunk": "c", "of": 1, "metrics": {}}\n'
DEEP = "[" * 1_000_000
LONG = "9" * 6000
STUDY = "directions: {d: x}\nprompts: {prove: [b]}\n"


def aliases() -> str:
    """A list of lists, each of which holds the one before nine times."""
    lists = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 13)]
    return f"[{', '.join(lists)}]"


STUDIES = {
    "aliases": f"{STUDY}sampling: {aliases()}",
    "aliases as a prompt": f"directions: {{d: x}}\nprompts: {{prove: {aliases()}}}",
    "aliases as a direction": f"directions: {{d: {aliases()}}}\nprompts: {{prove: [b]}}",
    "an alias of itself": "directions: {d: x}\nprompts: &p {prove: *p}\n",
    "deep lists": STUDY + "sites: " + DEEP,
    "deep lists in lines": STUDY + "sites:\n" + "- " * 100_000 + "1",
    "deep mappings": STUDY + "sampling: " + "{a: " * 100_000,
    "digits": STUDY + f"seeds: {LONG}",
    "digits of a dose": STUDY + f"coefficients: 1.{LONG}",
    "hexadecimal digits": STUDY + f"seeds: 0x{'f' * 6000}",
    "keys": STUDY + "? " * 100_000,
    "a huge file": None,
}
MANIFESTS = {
    "deep": DEEP,
    "deep objects": '{"a":' * 300_000,
    "digits": f'{{"threads": {LONG}}}',
    "many lists": "[" + "[]," * 2_000_000 + "0]",
    "a huge file": None,
}
ROWS = {
    "deep": HEAD + DEEP + "\n" + ROW,
    "deep head": DEEP + "\n" + ROW,
    "digits": HEAD + ROW.replace('"a"', LONG) + ROW,
    "an endless line": None,
    "an endless line behind rows": HEAD + ROW,
}
SCRIPT = """
import json, resource, sys, time
from pathlib import Path

import interp_steer.report.report
from interp_steer.errors import SteerError
from interp_steer.results.rows import Results
from interp_steer.report.run import Run
from interp_steer.study.file import StudyFile

readers = {"study.yaml": StudyFile.read, "rows.jsonl": Results}
readers["manifest.json"] = readers["plan.jsonl"] = lambda path: Run(path.parent)


def now():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) // 1024


# beyond this, what is read fails; the peak is asked for below
free = Path("/proc/self/statm").read_text().split()[0]
limit = int(free) * resource.getpagesize() + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in map(Path, json.load(sys.stdin)):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = now(), time.process_time()
    try:
        readers[path.name](path)
        told = "it was read"
    except SteerError as error:
        told = str(error)
    except BaseException as error:
        told = f"{type(error).__name__}\\n{error}"[:200]
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) // 1024
    print(json.dumps([str(path), told, time.process_time() - start, peak - before]), flush=True)
"""


def test_each_bomb_is_refused_at_once(tmp_path):
    paths = []
    for name, bombs in (
        ("study.yaml", STUDIES),
        ("manifest.json", MANIFESTS),
        ("rows.jsonl", ROWS),
    ):
        for bomb, text in bombs.items():
            path = tmp_path / name.partition(".")[0] / bomb / name
            path.parent.mkdir(parents=True)
            path.write_text(text or "")
            if text is None or bomb == "an endless line behind rows":
                with path.open("r+b") as file:
                    file.truncate(2**36)  # sparse: 64 GiB of zeros
            paths.append(path)
    for bomb, text in (("deep", DEEP), ("digits", f'{{"key": {LONG}}}\n')):
        folder = tmp_path / "plan" / bomb
        folder.mkdir(parents=True)
        shutil.copy(BEFORE / "run" / "manifest.json", folder)
        (folder / "plan.jsonl").write_text(text)
        paths.append(folder / "plan.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(list(map(str, paths))), capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(path) for path, *_ in found] == paths, done.stderr[-2000:]
    for path, told, seconds, megabytes in found:
        assert path in told and "\n" not in told and len(told) < 600, (path, told)
        assert seconds < 2 and megabytes < 300, (path, told, seconds, megabytes)


def test_a_study_file_may_use_aliases(tmp_path):
    from interp_steer.study.file import StudyFile

    path = tmp_path / "s.yaml"
    path.write_text("directions: {d: &x x, e: *x}\nprompts: {choose: [a], prove: &p [b, c]}\n")
    assert StudyFile.read(path).spec["directions"] == {"d": "x", "e": "x"}
    with pytest.raises(ValueError, match="contains itself"):
        path.write_text("directions: {d: x}\nprompts: {prove: &p [b, *p]}\n")
        StudyFile.read(path)
