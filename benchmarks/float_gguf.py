"""A quantised GGUF file with its weights written out as numbers: what every contestant then computes with is the same model.

Projects that read GGUF would otherwise compute with the quantised weights, which are fewer bytes to read and, in some, other values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

KEPT_BY_WRITER = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_float_gguf(source: Path, target: Path, *, dtype: str = "float32") -> None:
    """Write ``source`` to ``target`` with all quantised tensors in one floating type; what is float32 stays so.

    Args:
        source: a GGUF file.
        target: a new file.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; float32 holds the weights exactly.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    kind = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}
    stored = {"float32": gguf.GGMLQuantizationType.F32, "float16": gguf.GGMLQuantizationType.F16}
    stored["bfloat16"] = gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, entry in reader.fields.items():
        if not name.startswith(KEPT_BY_WRITER):
            inner = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=inner)
    writer.add_file_type(kind[dtype])
    for tensor in reader.tensors:
        values: Any = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, values)
            continue
        shape = values.shape
        raw = gguf.quantize(np.ascontiguousarray(values, dtype=np.float32), stored[dtype])
        writer.add_tensor(tensor.name, raw, raw_shape=raw.shape if raw.dtype == np.uint8 else shape, raw_dtype=stored[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
