"""Write an attention backend, find its bug with the conformance check, mend it, and generate with it.

    python examples/05_your_own_backend.py

A backend is any object with the methods of ``AttentionBackend``. This one says that it knows causal attention and sliding windows only.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pagedkv import LLM, SamplingParams
from pagedkv.attention import AttendOptions, AttentionSpec, StepAttention
from pagedkv.storage import LayerPool, StepBatch
from pagedkv.testing.conformance import check_attention_backend
from pagedkv.testing.models import tiny_model
from pagedkv.testing.violations import ViolationError


class Mine:
    """Gathers each sequence's K and V through its block table and calls torch's attention."""

    name = "mine"

    def supports(self, spec: AttentionSpec) -> str | None:
        if spec.mask.kind == "chunked" or spec.softcap is not None or spec.sinks or spec.alibi:
            return "only causal attention and sliding windows"
        return None

    def plan(self, batch: StepBatch) -> StepAttention:
        return StepAttention(batch)

    def write(self, pool: LayerPool, key: Tensor, value: Tensor, step: StepAttention) -> None:
        group = pool.spec.group
        pool.write(key, value, blocks=step.batch.slot_blocks[group], offsets=step.batch.slot_offsets[group])

    def attend(self, query: Tensor, pool: LayerPool, step: StepAttention, options: AttendOptions) -> Tensor:
        plan, outputs = step.batch.plan, []
        for seq, length in enumerate(plan.seq_lens.tolist()):
            queries = query[int(plan.cu_seqlens_q[seq]) : int(plan.cu_seqlens_q[seq + 1])]
            key, value = pool.gather(step.batch.block_tables[pool.spec.group, seq].long(), length)
            position = torch.arange(length - len(queries), length, device=query.device)[:, None]
            seen = options.mask.visible(position, torch.arange(length, device=query.device))
            key, value = self.readable(key, seen), self.readable(value, seen)
            heads = query.shape[1] // len(key)
            key, value = key.repeat_interleave(heads, dim=0), value.repeat_interleave(heads, dim=0)
            output = scaled_dot_product_attention(queries.transpose(0, 1), key, value, attn_mask=seen, scale=options.scale)
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs)

    def readable(self, gathered: Tensor, seen: Tensor) -> Tensor:
        return gathered  # wrong: behind a window there may be anything, and nothing times NaN is NaN


class Mended(Mine):
    def readable(self, gathered: Tensor, seen: Tensor) -> Tensor:
        return torch.where(seen.any(dim=0)[:, None], gathered, 0)


violation = None
try:
    check_attention_backend(Mine())
except ViolationError as error:
    violation = error
print(f"found: {violation}\n")
assert violation is not None
assert violation.kind == "finite"

report = check_attention_backend(Mended(), num_cases=100)
print(f"mended: {report}\n")
assert report.num_run > 20

prompts, params = [[11, 23, 5, 42, 77, 8, 30], [64, 3, 51]], SamplingParams(temperature=0, max_tokens=12)
outputs = []
for backend in (Mended(), "reference"):
    with LLM(tiny_model("mistral"), attention_backend=backend, check="audit") as llm:  # its layers have sliding windows
        outputs.append([each.outputs[0].token_ids for each in llm.generate(prompts, params, use_tqdm=False)])
assert outputs[0] == outputs[1]
print(f"generated with it, the same tokens as with the reference: {list(outputs[0][0])}")
