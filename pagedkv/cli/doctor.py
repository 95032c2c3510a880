"""What would run here, and why: attention kernels, linear layers, threads; and, given a model, which way it runs and how right that is.

It owns the words. What is there is found out by those who would use it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections import Counter
from dataclasses import dataclass

import torch

from pagedkv.attention import get_backend
from pagedkv.attention.native.library import BUILDS, load_library
from pagedkv.attention.native.products import PairProduct
from pagedkv.errors import UnsupportedModelError
from pagedkv.models import ModelRunner, SelfCheck, TierReport, load_model, plan_memory, product_dtype, why_not_packable

_WAYS = {
    "packed": "packed: the tokens of a step in one row, attention by backend {!r}",
    "dense": "dense: one row a sequence, the model's own attention over K/V gathered from blocks",
    "dense-equal": "dense-equal: as dense (the model's own attention over K/V gathered from blocks), with rows of one length at a time",
    "encoder-decoder": "encoder-decoder: one row a sequence, the model's own attention over K/V gathered from blocks, of both kinds",
    "encoder-decoder-equal": "encoder-decoder-equal: as encoder-decoder, with inputs and rows of one length at a time",
}
_JUDGEMENTS = {
    "numbers": "no logit may differ by more",
    "ranks": "in half precision one position of ten may, and three of four must name the same next token",
}
_PACKAGES = ("pagedkv", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the account: what it is about, what was found, and the reasons behind it."""

    subject: str
    found: str
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.subject:<24}{self.found}", *(f"{'':<26}{reason}" for reason in self.reasons)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", nargs="?", help="hub id, folder or .gguf file: load it, run the self-check, say what it takes")
    parser.add_argument("--dtype", help="of the model's weights and K/V; the checkpoint's own when not given")
    parser.add_argument("--tier", choices=("auto", *_WAYS), default="auto", help="the only way of running the model to try")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(options: argparse.Namespace) -> int:
    """Print the account; 1 where the model is refused. Raises what loading it raises."""
    findings, status = _machine(), 0
    if options.model is not None:
        about_it, status = _model(options)
        findings += about_it
    if options.json:
        print(json.dumps({finding.subject: {"found": finding.found, "reasons": list(finding.reasons)} for finding in findings}, indent=1))
    else:
        print("\n".join(map(str, findings)))
    return status


def _machine() -> list[Finding]:
    loaded = load_library()
    backend = get_backend("auto", device="cpu")
    threads = getattr(backend, "num_threads", None)
    builds = ", ".join(build.name for build in BUILDS if build.path.is_file()) or "none"
    return [
        Finding("versions", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)),
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding(
            "attention on the CPU",
            f"backend {backend.name!r}"
            + (f", build {loaded.library.build.name}" if loaded.library else "")
            + (f", {threads} threads (torch.set_num_threads changes it)" if threads else ""),
            (f"libraries here: {builds}", *loaded.reasons),
        ),
        *map(_linear_layers, (torch.float32, torch.bfloat16)),
        Finding("attention on CUDA", f"backend {get_backend('auto', device='cuda').name!r}"),
    ]


def _linear_layers(dtype: torch.dtype) -> Finding:
    subject, reason = f"linear layers, {str(dtype).removeprefix('torch.')}", why_not_packable(dtype)
    if reason is not None:
        return Finding(subject, "as the model has them", (reason,))
    library = load_library().library
    multiplied = product_dtype(dtype)
    natively = library is not None and PairProduct.fits(torch.empty(0, 0, dtype=dtype), library)  # widths are a model's matter
    who = "the native library where widths are multiples of 32, else oneDNN" if natively else "oneDNN"
    return Finding(subject, f"repacked weights ({who}), multiplied in {str(multiplied).removeprefix('torch.')}")


def _model(options: argparse.Namespace) -> tuple[list[Finding], int]:
    """The findings, and the exit status."""
    model = load_model(options.model, dtype=options.dtype)
    try:
        runner = ModelRunner(model, block_size=options.block_size, tier=options.tier)
    except UnsupportedModelError as error:
        return [Finding("model", f"{type(model).__name__}: refused", (str(error),))], 1
    packing, fusion = runner.packing, runner.fusion
    plan = plan_memory(model, block_size=options.block_size)
    findings = [
        Finding("model", f"{type(model).__name__}, {runner.dtype} on {runner.device}"),
        Finding("tier", _WAYS[runner.tier.name].format(runner.backend_name), _about_tier(runner.tier)),
        _self_check(runner.report),
        _layers(runner),
        _groups(runner),
        _positions(runner),
        Finding(
            "K/V",
            f"{plan.nbytes_per_token:,} bytes a token, {plan.nbytes_per_block:,} a block of {options.block_size}",
            (f"{plan.nbytes_per_source_token:,} bytes a token of the encoder, in the same blocks",) if runner.encoder else (),
        ),
        *_recurrent_state(runner, plan.state_nbytes),
        Finding(
            "packed linear layers",
            f"{len(packing.packed)}, {packing.nbytes:,} bytes beside the model's own weights",
            (packing.reason,) if packing.reason else (),
        ),
        Finding(
            "fused parts",
            f"{len(fusion.layers)} whole layers{' in one call' if fusion.body else ''}, {len(fusion.modules)} norms and MLPs, "
            f"the rotation of {', '.join(fusion.rotations) or 'no modeling file'}",
            (fusion.reason,) if fusion.reason else (),
        ),
    ]
    unsupported = _unsupported(runner)
    if unsupported:
        findings.append(Finding("not supported", f"{len(unsupported)}", unsupported))
    runner.close()
    return findings, 0


def _about_tier(tier: TierReport) -> tuple[str, ...]:
    by_adapter = (f"by an adapter for {name}, which has no attention interface, as long as a step runs" for name in tier.adapters)
    return (*by_adapter, *(f"not {name}: {reason}" for name, reason in tier.rejected.items()))


def _self_check(report: SelfCheck) -> Finding:
    return Finding(
        "self-check",
        f"passed: largest logit difference {report.max_relative_error:.1e} of the largest logit, {report.bound:.0e} allowed",
        (
            f"judged by {report.judged_by}: {_JUDGEMENTS[report.judged_by]}; {report.argmax_agreement:.0%} of next tokens agree",
            *_copy(report),
            f"sequences of {', '.join(map(str, report.sequence_lens))} tokens in {report.num_steps} steps",
            *(f"{mask.kind} mask of {mask.size} was crossed" for mask in report.windows),
            *(
                f"{mask.kind} mask of {mask.size} is too wide to cross here: its classification is trusted"
                for mask in report.windows_not_crossed
            ),
        ),
    )


def _copy(report: SelfCheck) -> tuple[str, ...]:
    """What was judged by numbers of a model in half precision."""
    if report.copy is not None:
        layers, error, bound = report.copy.num_layers, report.copy.max_relative_error, report.copy.bound
        return (f"judged by numbers on a float32 copy of {layers} layers: {error:.1e} of the largest logit, {bound:.0e} allowed",)
    return () if report.why_no_copy is None else (f"no judgement by numbers on a float32 copy: {report.why_no_copy}",)


def _layers(runner: ModelRunner) -> Finding:
    masks = runner.tier.masks or ((),) * len(runner.layers)
    kinds = Counter(
        f"K/V of {layer.num_kv_heads} heads, K {layer.key_dim} and V {layer.value_dim} wide, group {layer.group}, read {way}"
        + (f" with {' and '.join(f'{mask.kind} mask' + (f' of {mask.size}' if mask.size else '') for mask in seen)}" if seen else "")
        for layer, way, seen in zip(runner.grouped_layers, runner.tier.layers, masks, strict=True)
    )
    return Finding("layers", f"{len(runner.layers)} that store K/V", tuple(f"{count} x {kind}" for kind, count in kinds.items()))


def _groups(runner: ModelRunner) -> Finding:
    counts = Counter(layer.group for layer in runner.grouped_layers)
    return Finding(
        "layer groups",
        f"{len(runner.windows)}",
        tuple(
            f"group {group}: {counts[group]} layers, {nbytes:,} bytes a block, "
            + ("every block is kept" if window is None else f"blocks behind a {window.kind} window of {window.size} are given back")
            for group, (window, nbytes) in enumerate(zip(runner.windows, runner.group_nbytes, strict=True))
        ),
    )


def _positions(runner: ModelRunner) -> Finding:
    found, reasons = _limit(runner.max_positions), [] if runner.max_positions_reason is None else [runner.max_positions_reason]
    if runner.far_positions is not None:
        found += f", and {runner.far_positions:,} for prompts that are longer than that alone"
    if runner.encoder is not None:
        source, decoder = runner.encoder.max_source_tokens, runner.encoder.max_decoder_tokens
        reasons.append(f"{_limit(source)} of the encoder and {_limit(decoder)} of the decoder")
    return Finding("positions", found, tuple(reasons))


def _limit(positions: int | None) -> str:
    return "no limit" if positions is None else f"{positions:,}"


def _unsupported(runner: ModelRunner) -> tuple[str, ...]:
    config = runner.model.config
    text = config.get_text_config(decoder=True)
    others = [name for name in config.sub_configs if getattr(config, name, None) not in (None, text)]
    return tuple(f"{name.removesuffix('_config')}: text alone goes in and comes out" for name in others)


def _recurrent_state(runner: ModelRunner, nbytes: int) -> list[Finding]:
    if runner.recurrent_state == "none":
        return []
    whole = runner.recurrent_state == "whole"
    return [
        Finding(
            "recurrent state",
            f"{nbytes:,} bytes a sequence, whatever its length",
            (
                "prefixes are not cached: no block holds the state at their end",
                "prompts are computed in one piece, and what is longer than max_num_batched_tokens token by token, which takes long: "
                "the model goes on from a state by one token only"
                if whole
                else "prompts may be computed in chunks",
            ),
        )
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
