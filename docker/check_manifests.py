"""Checks Kubernetes manifests against the schemas of their kinds; unknown fields are errors.

``kubectl kustomize docker/k8s/overlays/a100 | python docker/check_manifests.py`` reads standard
input, and files if any are named. Kubernetes' own kinds are checked by the schemas that
kubernetes-validate brings, those of KEDA and of the Prometheus operator by ``docker/k8s/schemas/``.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

SCHEMAS = Path(__file__).parent / "k8s" / "schemas"
KUBERNETES = "1.33"


def manifest_faults(manifest: dict[str, Any]) -> Iterator[str]:
    """Says what is wrong with a manifest.

    Args:
        manifest: One document.

    Yields:
        Where and what, a line each.
    """
    name = f"{manifest.get('kind')}/{manifest.get('metadata', {}).get('name')}"
    own = SCHEMAS / f"{manifest.get('apiVersion', '')}-{manifest.get('kind')}.json".replace(
        "/", "-"
    )
    if own.is_file():
        schema = json.loads(own.read_text(encoding="utf-8"))
        for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest):
            yield f"{name}: {error.json_path}: {error.message}"
        return
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        yield f"{name}: there is no schema of {manifest.get('apiVersion')} {manifest.get('kind')}"


def main() -> None:
    """Checks files or standard input, and ends with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    files: list[Path] = parser.parse_args().files
    texts = [file.read_text(encoding="utf-8") for file in files] or [sys.stdin.read()]
    manifests = [each for text in texts for each in yaml.safe_load_all(text) if each]
    faults = [fault for manifest in manifests for fault in manifest_faults(manifest)]
    if not manifests:
        faults.append("there is no manifest")
    for fault in faults:
        print(fault, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
