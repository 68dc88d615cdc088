"""A report opens where no model does: on a machine without torch, of a run from elsewhere."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BEFORE = Path(__file__).parents[1] / "data" / "before" / "run"
HEAVY = ("torch", "transformers", "transformer_lens", "sae_lens")
CODE = """
import json, sys
from interp_steer.cli.main import main
sys.argv = ["interp-steer", *{arguments}]
try:
    main()
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps(sorted(set(sys.modules) & set({heavy}))))
"""


@pytest.mark.parametrize("command", [["report"], ["study", "table"]])
def test_a_finished_run_is_read_without_torch(tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(BEFORE, folder)
    arguments = [*command, str(folder), "--out", str(tmp_path / "out.html")]
    if command[-1] == "table":
        arguments[-1] = str(tmp_path / "out.csv")
    code = CODE.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert Path(arguments[-1]).stat().st_size > 1000
