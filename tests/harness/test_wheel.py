"""A built wheel installs and runs outside the checkout, and puts nothing but flash2 into site-packages."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (built,) = target.glob("*.whl")
    return built


def test_everything_is_under_flash2(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"flash2", f"flash2_triton-{wheel.name.split('-')[1]}.dist-info"}
    for module in (
        "__init__",
        "bench",
        "core/cell",
        "backends/naive",
        "backends/triton_fa2/__init__",
        "core/training/trainer",
        "integrations/transformers",
    ):
        assert f"flash2/{module}.py" in names
    assert not any(name.startswith("flash2/tests/") for name in names)


def test_it_runs_where_there_is_no_checkout(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, system_site_packages=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    # torch and friends come from the environment the tests run in; flash2 must not.
    parent = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "parent.pth").write_text(parent + "\n")
    code = "import flash2, sys; print(flash2.__file__); sys.argv = ['flash2-bench', *sys.argv[1:]]; from flash2.bench import main; sys.exit(main())"
    words = "--backends naive,sdpa --device cpu --heads 2 --head-dim 32 --seqlen 64 --seconds 0.02 --causal no --out r.jsonl"
    done = subprocess.run(
        [home / "bin" / "python", "-c", code, *words.split()], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout and (tmp_path / "r.jsonl").read_text().count('"status": "ok"') == 2
